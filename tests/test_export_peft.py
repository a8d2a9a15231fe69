"""Adapters that are exported for peft: transformers and peft alone give the learner's logits."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_loaded import run
from texts import LABELS, write_sets
from torch import Tensor, nn

import clplat
from clplat.errors import UserError
from clplat.run.peft_folder import joined

ROOT = Path(os.environ.get("CLPLAT_DATA", ""), "weights")
TEXTS = [f"{task} {i}?" for task in LABELS for i in range(3)]
READS = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # transformers', of itself


def trained(folder: Path, strategy: str, backbone: dict[str, Any], steps: int = 3, **stream: Any) -> Any:
    """A run on texts whose adapters have learned something."""
    sets = write_sets(folder / "sets")
    stream = {"name": "text", "benchmark": "jsonl", "path": str(sets), "tasks": list(LABELS), **stream}
    options = {"name": strategy, "lr": 1e-2, "projections": []}
    return run(folder, strategy=options, stream=stream, backbone=backbone, loop={"max_steps": steps, "batch_size": 4})


def small(folder: Path, config: Any) -> str:
    """Folder with the weights of a small model, as transformers saves them."""
    from transformers import AutoModel, AutoModelForCausalLM

    torch.manual_seed(0)
    kind = AutoModelForCausalLM if config.model_type == "gpt2" else AutoModel
    kind.from_config(config).save_pretrained(folder)
    return str(folder)


def encoded(folder: Path, base: str, ids: Tensor) -> Tensor:
    """Logits of an encoder and a head, by transformers, peft and two lines of arithmetic; ids (N, L)."""
    from peft import PeftModel
    from transformers import AutoModel

    net = PeftModel.from_pretrained(AutoModel.from_pretrained(base), folder).eval()
    real = ids >= 0
    with torch.no_grad():
        states = net(input_ids=ids.clamp(min=0).long(), attention_mask=real.long()).last_hidden_state
    head = load_file(folder / "head.safetensors")
    pooled = (states * real.unsqueeze(2)).sum(1) / real.sum(1, keepdim=True)
    return F.linear(pooled, head["weight"], head["bias"])


def answered(folder: Path, base: str, prompts: Tensor) -> Tensor:
    """Log-likelihoods of all answers of learner.json (N, C), one by one, by transformers and peft; prompts (N, L)."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    net = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
    rows = []
    for padded in prompts:
        prompt, row = padded[padded >= 0].long().tolist(), []
        for answer in json.loads((folder / "learner.json").read_text())["class_tokens"]:
            words = [i for i in answer if i >= 0]
            with torch.no_grad():
                logits = net(input_ids=torch.tensor([prompt + words[:-1]])).logits[0, len(prompt) - 1 :]
            row.append(float(logits.log_softmax(1)[range(len(words)), words].sum()))
        rows.append(row)
    return torch.tensor(rows)


def same(found: Tensor, learner: Any, prepared: Tensor) -> None:
    scores = learner.predict(prepared)
    torch.testing.assert_close(found, scores[:, : found.shape[1]], rtol=1e-5, atol=1e-5)
    with learner.predicting(), torch.no_grad():  # the adapters have a part in it
        for name, factor in learner.model.named_parameters():
            if ".lora_B." in name:
                factor.zero_()
        bare = learner.model.predict(prepared)
    assert not torch.allclose(bare, scores, rtol=1e-3, atol=1e-3)


@READS
@pytest.mark.parametrize("strategy", ["lora", "olora", "ilora"])
def test_an_encoder_with_adapters_gives_the_learners_logits(strategy: str, tmp_path: Path) -> None:
    from transformers import BertConfig

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = small(tmp_path / "base", BertConfig(vocab_size=300, **size))
    stream = {"tokenizer": "bytes", "answer": "class"}
    result = trained(tmp_path, strategy, {"name": "text_encoder", "weights": base}, **stream)
    folder, learner = clplat.export(result.run_dir, to="peft"), clplat.load(result.run_dir)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == base
    prepared = learner.prepare(TEXTS)
    same(encoded(folder, base, prepared[:, 0]), learner, prepared)


@READS
def test_layers_of_gpt2_keep_their_layout(tmp_path: Path) -> None:
    from transformers import GPT2Config

    dropped = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    config = GPT2Config(vocab_size=300, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=2, **dropped)
    base = small(tmp_path / "base", config)
    result = trained(tmp_path, "olora", {"name": "language_model", "weights": base}, tokenizer="bytes")
    folder, learner = clplat.export(result.run_dir, to="peft"), clplat.load(result.run_dir)
    assert json.loads((folder / "adapter_config.json").read_text())["fan_in_fan_out"] is True
    assert not (folder / "head.safetensors").exists()
    prepared = learner.prepare(TEXTS)
    same(answered(folder, base, prepared[:, 0]), learner, prepared)


def test_adapters_of_several_scales_become_one() -> None:
    from peft import LoraConfig, inject_adapter_in_model

    net = nn.Sequential(nn.Linear(5, 4))
    for name, rank, alpha in (("one", 2, 3), ("two", 3, 1)):
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"]), net, name)
        getattr(net, "__dict__", {}).pop("peft_config", None)
    layer: Any = net[0]
    for factor in (*layer.lora_A.parameters(), *layer.lora_B.parameters()):
        nn.init.normal_(factor)
    layer.set_adapter(["one", "two"])
    rank, scale, pairs = joined({"0": layer})
    change = sum(s * layer.lora_B[n].weight @ layer.lora_A[n].weight for n, s in (("one", 3 / 2), ("two", 1 / 3)))
    assert rank == 5
    torch.testing.assert_close(scale * pairs["0"][1] @ pairs["0"][0], change)


@pytest.mark.parametrize(
    ("strategy", "backbone", "fault"),
    [
        ({"name": "lora"}, {"name": "text_encoder", "dim": 16, "depth": 1}, "weights is random"),
        ({"name": "moram", "rank": 2}, {"name": "text_encoder", "dim": 16, "depth": 1}, "moram has changed the net"),
        ({"name": "svd_orthogonal"}, {"name": "text_encoder", "dim": 16, "depth": 1},
         r"LoRA layers in use, and svd_orthogonal predicts without any \(valid: safetensors, or hf"),
    ],
    ids=["random", "moram", "svd"],
)  # fmt: skip
def test_what_peft_cannot_say_is_refused(
    strategy: dict[str, Any], backbone: dict[str, Any], fault: str, tmp_path: Path
) -> None:
    stream = {"name": "text", "benchmark": "jsonl", "path": str(write_sets(tmp_path / "sets")), "tasks": ["color"],
              "tokenizer": "bytes"}  # fmt: skip
    result = run(tmp_path, strategy=strategy, stream=stream, backbone=backbone, loop={"max_steps": 1})
    with pytest.raises(UserError, match=fault) as refused:
        clplat.export(result.run_dir, to="peft")
    assert len(refused.value.faults) == 1
    assert not (result.run_dir / "export").exists()


def test_a_base_that_was_changed_is_refused(tmp_path: Path) -> None:
    from transformers import BertConfig

    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = small(tmp_path / "base", BertConfig(vocab_size=300, **size))
    backbone = {"name": "text_encoder", "weights": base}
    result = trained(tmp_path, "lora", backbone, tokenizer="bytes", answer="class")
    learner = clplat.load(result.run_dir)
    from clplat.config.resolve import resolve
    from clplat.run.export import export

    with torch.no_grad():
        next(p for n, p in learner.named_parameters() if "LayerNorm" in n).add_(1)
    with pytest.raises(UserError, match=r"1 tensors of the base itself have changed, net\.embeddings\.LayerNorm"):
        export(learner, resolve(config=result.run_dir / "config.yaml"), "peft", tmp_path / "out")


@READS
@pytest.mark.slow
@pytest.mark.skipif(not ROOT.joinpath("minilm_l6").is_dir(), reason="no minilm_l6 or smollm2_135m at hand")
@pytest.mark.parametrize(
    ("strategy", "family", "weights", "read"),
    [("olora", "text_encoder", "minilm_l6", encoded), ("ilora", "language_model", "smollm2_135m", answered)],
)
def test_real_models(strategy: str, family: str, weights: str, read: Any, tmp_path: Path) -> None:
    result = trained(tmp_path, strategy, {"name": family, "weights": weights}, steps=1, tasks=["color"])
    folder, learner = clplat.export(result.run_dir, to="peft"), clplat.load(result.run_dir)
    prepared = learner.prepare(TEXTS[:2])
    same(read(folder, str(ROOT / weights), prepared[:, 0]), learner, prepared)
