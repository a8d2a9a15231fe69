"""Weights in half precision: which runs learn by them, and the backbone that has them.

Under `fabric.precision: bf16-true` or `16-true` the parameters of a backbone are in that type, and so are its passes.
Features and logits, and with them losses and scores, are in single precision, and so are heads, adapters and memories.
"""

from __future__ import annotations

import torch

from clplat.backbones.base import Backbone
from clplat.config.resolve import DEFAULTS
from clplat.config.settings import Config
from clplat.strategy import Strategy

KEY = "fabric.precision"
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16}


def narrow(config: Config, backbone: Backbone) -> Backbone:
    """The backbone itself, in the type that is asked for; one that is not known in it stays as it is."""
    dtype = DTYPES.get(config.fabric.precision)
    return backbone if dtype is None or not backbone.narrowable else backbone.narrowed(dtype)


def faults(config: Config, strategy: Strategy) -> list[str]:
    """Why it can't learn by weights in half precision, one line each."""
    precision, cls, trained = config.fabric.precision, type(strategy), trained_half(strategy)
    if precision not in DTYPES:
        return _coarse(strategy) if trained else []
    backbone = getattr(strategy.model, "backbone", None)
    found = []
    if not cls.__dict__.get("plain_passes"):
        found.append(f"{cls.__name__} has not been seen to learn by such weights (valid: 32-true, bf16-mixed)")
    if not (isinstance(backbone, Backbone) and backbone.narrowable):
        known = "language_model, text_encoder, vit"
        found.append(f"backbone {config.backbone.name} has not been seen to compute in it (valid: {known})")
    if trained and precision == "16-true":
        valid = "valid: bf16-true, bf16-mixed; or a strategy with adapters"
        found.append(f"{cls.__name__} trains the backbone, whose small gradients are zero in float16 ({valid})")
    elif trained and strategy.optimizer_name != "sgd":
        what = (
            f"strategy.optimizer is {strategy.optimizer_name}, whose mean of squared gradients can't fall in bfloat16"
        )
        found.append(f"{what} (valid: sgd; or bf16-mixed)")
    if config.backbone.options.get("dtype") == "bfloat16" and precision == "16-true":
        found.append("backbone.dtype is bfloat16 (valid: bf16-true)")
    if config.merge.name != DEFAULTS["merge"]:
        found.append(f"merge: {config.merge.name} takes parts of what a step has changed (valid: none, or bf16-mixed)")
    if config.loop.diagnostics:
        found.append("loop.diagnostics decompose weights in single precision (valid: [], or bf16-mixed)")
    return [f"{KEY}: {precision}, but {why}" for why in found]


def notes(config: Config, strategy: Strategy) -> list[str]:
    """What is said before weights are trained in half precision."""
    count = trained_half(strategy)
    said = (
        f"{KEY}: {config.fabric.precision}: {count:,} weights are trained in it: what a step changes by less than 2⁻⁹"
    )
    return [f"{said} of a weight is lost"] if count and config.fabric.precision in DTYPES else []


def trained_half(strategy: Strategy) -> int:
    """Trained parameters in half precision."""
    half = (p for p in strategy.parameters() if p.requires_grad and p.dtype in DTYPES.values())
    return 0 if strategy.frozen_features else sum(p.numel() for p in half)


def _coarse(strategy: Strategy) -> list[str]:
    """The fault of training weights whose precision loses most steps: below 2⁻⁹ of a weight in bfloat16."""
    half = {p.dtype for p in strategy.parameters() if p.requires_grad and p.dtype in DTYPES.values()}
    name, dtype = type(strategy).__name__, str(half.pop()).removeprefix("torch.")
    return [
        f"backbone.dtype: {dtype} loses most steps of the weights, which {name} trains (valid: float32, with "
        "fabric.precision bf16-mixed for speed; or a strategy with adapters, whose weights are frozen)"
    ]
