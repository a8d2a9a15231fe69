"""The low-rank adapters of a run as peft reads them, beside the pretrained model that they were trained for.

    peft.PeftModel.from_pretrained(base, folder)          base: the model of transformers or timm that the run had

The adapters that are in use become one: A's rows and B's columns side by side, whose product is the sum of theirs.

    Σ_t s_t B_t A_t = s [s_1/s B_1 … s_T/s B_T] [A_1; …; A_T],   s = alpha / r,   r = Σ_t r_t

`head.safetensors` holds the head, which is none of the base's.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from clplat.backbones._weights import files_read, origin, transposed_layers
from clplat.backbones.base import Backbone, Classifier
from clplat.config.settings import Config
from clplat.errors import UserError
from clplat.files import write_atomic
from clplat.run.build import build_model
from clplat.run.learner import Learner, actions, size

_BASE = "backbone.net."  # of a name in our model, before what it is called in the base


def peft_folder(learner: Learner, network: Classifier, config: Config) -> Callable[[Path], None]:
    """What writes the adapters of a learner whose model holds the weights that predict.

    Raises:
        UserError: no adapters are in use; or their base has no name that others read, or was changed itself.
    """
    from peft import LoraConfig

    model: Any = learner.model
    wrapped = {n.removeprefix(_BASE): m for n, m in model.named_modules() if hasattr(m, "get_delta_weight")}
    layers = {name: layer for name, layer in wrapped.items() if layer.active_adapters}
    if not layers:
        raise UserError(f"to: peft is defined for LoRA layers in use, and {config.strategy.name} predicts without any "
                        "(valid: safetensors, or hf)")  # fmt: skip
    base = _named(model.backbone, config)
    _check_unchanged(model.backbone, learner, config)
    rank, scale, pairs = joined(layers)
    tensors = {
        f"base_model.model.{n}.lora_{k}.weight": t for n, ab in pairs.items() for k, t in zip("AB", ab, strict=True)
    }
    said = LoraConfig(
        r=rank,
        lora_alpha=scale * rank,  # type: ignore[arg-type]  # any number will do
        target_modules="|".join(map(re.escape, layers)),
        base_model_name_or_path=base,
        inference_mode=True,
        fan_in_fan_out=layers.keys() <= transposed_layers(model.backbone.net),
    )
    head = {k.removeprefix("head."): v.clone() for k, v in network.state_dict().items() if k.startswith("head.")}

    def write(dest: Path) -> None:
        said.save_pretrained(str(dest))
        write_atomic(dest / "adapter_model.safetensors", save(tensors))
        if head:
            write_atomic(dest / "head.safetensors", save(head))

    return write


@torch.no_grad()
def joined(layers: dict[str, Any]) -> tuple[int, float, dict[str, tuple[Tensor, Tensor]]]:
    """Rank r, scale s, and for each of peft's layers A (r, in) and B (out, r) of the sum over the adapters in use."""
    first = next(iter(layers.values()))
    used: list[str] = list(first.active_adapters)
    own = first.scaling[used[0]]
    scale: float = 1.0 if isinstance(own, Tensor) else own  # scales that were learned differ by layer
    pairs = {
        name: (
            torch.cat([layer.lora_A[a].weight for a in used]),
            torch.cat([layer.lora_B[a].weight * (layer.scaling[a] / scale) for a in used], 1),
        )
        for name, layer in layers.items()
    }
    return sum(first.r[a] for a in used), scale, pairs


def _named(backbone: Backbone, config: Config) -> str:
    """What the base is called; refuses one that transformers or timm can't make from that name."""
    from transformers import PreTrainedModel

    weights, net, name = config.backbone.options.get("weights"), getattr(backbone, "net", None), config.backbone.name
    if net is None or not {"transformers", "timm"} & {c.__module__.partition(".")[0] for c in type(net).__mro__}:
        raise UserError(f"to: peft needs a base of transformers or timm, and {name} is none (valid: safetensors)")
    if weights in (None, "random"):
        raise UserError(f"to: peft needs a base with a name, but backbone.weights is {weights} (valid: safetensors, or "
                        "a run on pretrained weights)")  # fmt: skip
    sources = {read[1] for p in net.parameters() if (read := origin(p)) is not None}
    if isinstance(net, PreTrainedModel) and any(source.endswith(".safetensors") for source in sources):
        raise UserError(f"to: peft needs a base that transformers reads, and {weights} is in llama2.c's layout (valid: "
                        "hf, or safetensors)")  # fmt: skip
    return str(weights) if isinstance(net, PreTrainedModel) else _of_timm(net, config)


@torch.no_grad()
def _of_timm(net: Any, config: Config) -> str:
    """Repository or file of the weights of a model of timm, which refuses one that these alone do not give."""
    from timm.models import create_model, get_pretrained_cfg

    options = config.backbone.options
    made: Any = create_model(net.pretrained_cfg["architecture"], pretrained=True, num_classes=0,
                             pretrained_cfg_overlay={"file": str(files_read(net)[0]), "source": ""})  # fmt: skip
    shapes = {k: v.shape for k, v in made.state_dict().items()}
    now = {k.replace(".base_layer.", "."): v.shape for k, v in net.state_dict().items() if ".lora_" not in k}
    if fitted := sorted(k for k in shapes.keys() | now.keys() if shapes.get(k) != now.get(k)):
        what = f"{len(fitted)} tensors were fitted to the run, {fitted[0]} for one"
        raise UserError(f"to: peft needs a base as timm makes it of the weights alone, but {what} (valid: safetensors, "
                        "or a run with the image size, patches, channels and depth of the weights)")  # fmt: skip
    if options["weights"] != "pretrained":
        return str(options["weights"])
    known = get_pretrained_cfg(options["model"]) if options.get("model") else None
    return str(known.hf_hub_id if known is not None else net.pretrained_cfg["hf_hub_id"])


@torch.no_grad()
def _check_unchanged(backbone: Backbone, learner: Learner, config: Config) -> None:
    """Refuse a base that is not as its files have it: merged into, trained, or begun from another run's weights."""
    fresh = build_model(
        config, *size(learner.of_run.facts), answers=actions(learner.of_run.facts)
    ).backbone.state_dict()
    now = {k.replace(".base_layer.", "."): v for k, v in backbone.state_dict().items() if ".lora_" not in k}
    if changed := [k for k, v in fresh.items() if k not in now or not torch.equal(v, now[k])]:
        what = f"{len(changed)} tensors of the base itself have changed, {changed[0]} for one"
        raise UserError(f"to: peft writes adapters alone, but {what} (valid: safetensors, or hf)")
