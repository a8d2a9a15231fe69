"""Adapters of image models that are exported for peft: timm, transformers and peft alone give the learner's logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm as library
import torch
import torch.nn.functional as F
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_export_peft import READS, same
from test_loaded import run
from torch import Tensor

import clplat
from clplat.errors import UserError

SIDE = 160  # of test_vit's images
MODEL = "test_vit"


def pictures(side: int, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Bytes (8, channels, side, side) of two classes, dark and light."""
    labels = np.arange(8) % 2
    noise = np.random.default_rng(0).integers(0, 100, (8, channels, side, side))
    return (noise + labels[:, None, None, None] * 120).astype(np.uint8), labels


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a small transformer, as timm's repositories have them."""
    folder = tmp_path_factory.mktemp("test_vit")
    torch.manual_seed(0)
    save_file(library.create_model(MODEL).state_dict(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": MODEL}))
    return folder


def trained(folder: Path, backbone: dict[str, Any], side: int = SIDE, channels: int = 3) -> Any:
    """A run whose adapters, in queries and values of layers that hold all three, have learned something."""
    given = pictures(side, channels)
    stream = {"name": "arrays", "train": given, "test": given, "experiences": 2}
    strategy = {"name": "olora", "lr": 1e-2, "rank": 2}
    return run(folder, strategy=strategy, stream=stream, backbone=backbone, loop={"max_steps": 2, "batch_size": 4})


@pytest.mark.parametrize("family", ["timm", "vit"])
def test_a_model_of_timm_with_adapters_gives_the_learners_logits(family: str, weights: Path, tmp_path: Path) -> None:
    file = weights / "model.safetensors"
    backbone = {"timm": {"weights": str(weights)},
                "vit": {"model": MODEL, "weights": str(file), "normalize": "half"}}[family]  # fmt: skip
    result = trained(tmp_path, {"name": family, **backbone})
    folder, learner = clplat.export(result.run_dir, to="peft"), clplat.load(result.run_dir)
    said = json.loads((folder / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == backbone["weights"]
    base = library.create_model(MODEL, pretrained=True, num_classes=0, pretrained_cfg_overlay={"file": str(file)})
    net, head = PeftModel.from_pretrained(base, folder).eval(), load_file(folder / "head.safetensors")
    prepared = learner.prepare(pictures(SIDE)[0])
    with torch.no_grad():
        found = F.linear(net((prepared - 0.5) / 0.5), head["weight"], head["bias"])
    same(found, learner, prepared)


@pytest.mark.parametrize(
    ("options", "side", "channels", "tensor"),
    [({"patch_size": 4}, 16, 3, "patch_embed.proj.weight"), ({}, SIDE, 1, "patch_embed.proj.weight"),
     ({"depth": 1}, SIDE, 3, r"blocks\.1\.attn\.proj\.bias")],
    ids=["patches", "grey", "depth"],
)  # fmt: skip
def test_a_base_that_was_fitted_to_the_run_is_refused(
    options: dict[str, Any], side: int, channels: int, tensor: str, weights: Path, tmp_path: Path
) -> None:
    backbone = {"name": "vit", "model": MODEL, "weights": str(weights / "model.safetensors"), **options}
    result = trained(tmp_path, backbone, side, channels)
    with pytest.raises(UserError, match=rf"tensors were fitted to the run, {tensor} for one \(valid: safeten") as error:
        clplat.export(result.run_dir, to="peft")
    assert len(error.value.faults) == 1
    assert not (result.run_dir / "export").exists()


def test_weights_of_the_hub_are_named_as_the_hub_does(weights: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("clplat.backbones.timm.from_hub", lambda model: str(weights / "model.safetensors"))
    result = trained(tmp_path, {"name": "timm", "model": f"{MODEL}.r160_in1k", "weights": "pretrained"})
    said = json.loads((clplat.export(result.run_dir, to="peft") / "adapter_config.json").read_text())
    assert said["base_model_name_or_path"] == f"timm/{MODEL}.r160_in1k"


@READS
def test_clip_with_adapters_gives_the_learners_logits(tmp_path: Path) -> None:
    from transformers import CLIPConfig, CLIPModel

    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 300, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2}
    config = CLIPConfig(text_config={**tower, **text}, vision_config={**tower, "image_size": 32, "patch_size": 8},
                        projection_dim=16)  # fmt: skip
    torch.manual_seed(0)
    base = str(tmp_path / "base")
    CLIPModel(config).save_pretrained(base)
    (tmp_path / "cifar10").mkdir()
    images, labels = pictures(32)
    for part in ("train", "test"):
        np.savez(tmp_path / "cifar10" / f"{part}.npz", images=images.transpose(0, 2, 3, 1), labels=labels)
    stream = {"name": "clip", "tasks": ["cifar10"], "image_size": 32, "tokenizer": "bytes"}
    strategy = {"name": "lora", "lr": 1e-2, "rank": 2}
    result = run(tmp_path, strategy=strategy, stream=stream, backbone={"name": "clip", "weights": base},
                 data_root=str(tmp_path), loop={"max_steps": 2, "batch_size": 4})  # fmt: skip
    folder, learner = clplat.export(result.run_dir, to="peft"), clplat.load(result.run_dir)
    assert not (folder / "head.safetensors").exists()
    prepared = learner.prepare(images.transpose(0, 2, 3, 1))
    same(compared(folder, base, prepared), learner, prepared)


def compared(folder: Path, base: str, images: Tensor) -> Tensor:
    """Logits by the towers of transformers' CLIP: each class's prompt alone, so that nothing is filled up."""
    from transformers import CLIPModel

    net = PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder).eval()
    with torch.no_grad():
        pooled = net.vision_model(pixel_values=images).pooler_output
        shown, columns = F.normalize(net.visual_projection(pooled), dim=-1), []
    for prompt in json.loads((folder / "learner.json").read_text())["class_tokens"]:
        ids = torch.tensor([[i for i in prompt if i >= 0]])
        with torch.no_grad():
            pooled = net.text_model(input_ids=ids).last_hidden_state[:, -1]  # at its end token
            text = F.normalize(net.text_projection(pooled), dim=-1)
            columns.append(net.logit_scale.exp() * shown @ text.T)
    return torch.cat(columns, 1)
