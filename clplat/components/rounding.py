"""Gradients that hold nothing but rounding."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn


def only_rounding(parameters: Iterable[nn.Parameter]) -> float | None:
    """The norm of their gradient where nothing but rounding is in it, else None.

    To first order a loss changes by ‖gradient‖ · ‖weights‖ if all weights change by their own size. Losses in nats that
    have something to follow change by hundredths and more; rounding gives ε times the number of terms that cancel.
    The bound, √ε of the weights' dtype, lies between.
    """
    chosen = [(p.detach(), p.grad) for p in parameters if p.grad is not None]
    if not chosen:
        return None
    weights, gradient = (math.hypot(*(float(t.norm()) for t in side)) for side in zip(*chosen, strict=True))
    return gradient if gradient * weights < max(torch.finfo(p.dtype).eps for p, _ in chosen) ** 0.5 else None
