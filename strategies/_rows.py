"""What strategies share that ask for a head with one row a class: that it is one, and means of features for rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat import Data, Strategy, UserError
from clplat.backbones.base import Classifier, Head
from clplat.components.prototypes import Prototypes
from clplat.strategies._once import once, shared


def require_rows(model: Classifier, done: str, linear: bool = False) -> None:
    """Refuse a model without a head, or one whose head does not predict by a row a class.

    Args:
        done: what is done with the head: "aligned".
        linear: whether the rows must be those of a linear layer.
    """
    if not model.backbone.needs_head:
        what = f"{type(model.backbone).__name__} answers in words, and it is a head that is {done}"
        raise UserError(f"backbone: {what} (valid: vit, timm, text_encoder, ...)")
    rows = not hasattr(model.head, "tasks_of") and type(model.head).predict is Head.predict
    if not rows or (linear and not hasattr(model.head, "bias")):
        name = type(model.head).__name__.lower()
        raise UserError(f"head: {name} does not predict by one row a class, to be {done} (valid: growing, linear)")


@torch.no_grad()
def class_means(strategy: Strategy, data: Data, classes: int, chunk: int = 32) -> Tensor:
    """Mean feature (classes, D) of each class in `data`, float64, over all processes; 0 where it has no sample.

    Args:
        chunk: samples that are run at a time.
    """
    model: Any = strategy.model
    means = Prototypes(model.backbone.embed_dim).to(data.inputs.device)
    means.grow(classes)
    means.open(shared(strategy))
    for x, y in once(strategy, data, chunk):
        means.add(model.features(x), y)
    means.gather()
    return means.totals / means.counts.clamp(min=1)[:, None]
