"""The loss of a task, as its model defines it; entropy, and cross-entropy between two predictions.

Shapes: B samples of a batch, C classes, A tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from clplat.components.precision import wide
from clplat.strategy import losses, tasks_of


def entropy(logits: Tensor) -> Tensor:
    """H(softmax(z)) of each row (B,), in nats; classes masked by -inf count as impossible."""
    return cross_entropy(logits, logits)


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """−Σ_k softmax(t)_k log softmax(z)_k of each row (B,), both logits (B, C)."""
    log = logits.log_softmax(1)
    return -(target.softmax(1) * log.masked_fill(log.isneginf(), 0.0)).sum(1)


def symmetric(logits: Tensor, target: Tensor) -> Tensor:
    """Mean of the cross-entropy and that with both logits (B, C) swapped, of each row (B,)."""
    return (cross_entropy(logits, target) + cross_entropy(target, logits)) / 2


def contrast(views: Tensor, temperature: float, labels: Tensor | None = None) -> Tensor:
    """−log of the share that another view of the same sample has among all views but itself: mean over all views.

    Source of the one with labels: Khosla et al., "Supervised Contrastive Learning", NeurIPS 2020, arXiv:2004.11362,
    equation 2.

    Args:
        views: V ≥ 2 of each of B samples, vectors of length 1, (V, B, P).
        labels: (B,): all views of samples of one label count as views of one sample.
    """
    flat, count = views.flatten(0, 1), views.shape[1]
    own = (torch.arange(count, device=views.device) if labels is None else labels).repeat(len(views))
    itself = torch.eye(len(flat), dtype=torch.bool, device=views.device)
    log = (flat @ flat.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (own == own[:, None]) & ~itself
    return -(log.masked_fill(~positive, 0.0).sum(1) / positive.sum(1)).mean()


def log_likelihood(model: Any, losses: Tensor, labels: Tensor) -> Tensor:
    """log p(y | x) of each sample (B,), in nats, from its loss as the model defines it: of the whole answer."""
    return -losses * (model.lengths(labels) if hasattr(model, "lengths") else 1)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """KL(softmax(t) ‖ softmax(z)) of each row (B,), in nats, both logits (B, C); a class masked in t counts 0."""
    log, aim = logits.log_softmax(1), target.log_softmax(1)
    masked = aim.isneginf()
    return (aim.exp() * (aim.masked_fill(masked, 0.0) - log.masked_fill(masked, 0.0))).sum(1)


def within(logits: Tensor, present: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy (B,) of logits (B, C) with labels (B,), over the classes where `present` (C,) bool is True."""
    return F.cross_entropy(torch.where(present, logits, -torch.inf), labels, reduction="none")


def own_losses(model: Any, inputs: Tensor, labels: Tensor, present: Tensor) -> Tensor:
    """Loss (B,) of each sample over the classes where `present` (C,) bool is True: those of one experience, say.

    A model whose answers are words decides by itself which of them compete.
    """
    if hasattr(model, "losses"):
        return losses(model, inputs, labels)
    task = tasks_of(model, labels)
    logits = model(inputs) if task is None else model(inputs, task)  # (B, C)
    return within(logits, present[: logits.shape[1]], labels)


class Losses(nn.Module):
    """`losses` as the forward pass of a module, for `torch.func.functional_call`; parameters are `model.<name>`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor, task: int | None = None) -> Tensor:
        """(B,) for inputs (B, ...) and labels."""
        return losses(self.model, inputs, labels, task)


@dataclass
class Scored:
    """Of each sample of a batch: its loss (B,), of how many answers one was to be chosen (B,), its features (B, D)."""

    losses: Tensor
    candidates: Tensor
    features: Tensor | None


def scored(model: Any, inputs: Tensor, labels: Tensor, features: bool = False) -> Scored:
    """Losses of a classifier as the model defines them, and what goes with them; in one pass where it has a head.

    Args:
        features: whether they are wanted.
    """
    if hasattr(model, "losses"):
        found = model.features(inputs) if features else None
        return Scored(losses(model, inputs, labels), model.candidates(inputs), found)
    found = model.features(inputs)
    logits = model.head(found)
    each = F.cross_entropy(logits, labels, reduction="none")
    return Scored(each, (logits > -torch.inf).sum(1), found)


def bounds(found: Scored, bound: float | None, chance: float = 2.0) -> Tensor:
    """Loss (B,) beyond which erasing pushes a sample no further: `bound`, or `chance` · ln C, C ≥ 2 its candidates."""
    if bound is not None:
        return torch.full_like(found.losses, bound)
    return (chance * found.candidates.clamp(min=2).double().log()).to(found.losses.dtype)


def hinge(gap: Tensor, world_size: int) -> Tensor:
    """ReLU of the mean gap over the samples of all processes, a scalar; at 0 its gradient is 0.

    Args:
        gap: this process's mean, as `Strategy.mean` weighs it.
    """
    whole = gap.detach().clone()
    if world_size > 1:  # by a process's own mean the bound would be reached here and not there
        torch.distributed.all_reduce(whole)
        whole /= world_size
    return torch.where(whole > 0, gap, torch.zeros_like(gap))


def single_losses(
    model: nn.Module, inputs: Tensor, labels: Tensor, values: Mapping[str, Tensor] | None = None
) -> Tensor:
    """`losses` (B,) in single precision at least, without autocast: for what bfloat16 would round away.

    Weights in half precision are widened for the pass, 4 bytes each.

    Args:
        values: stand in for the parameters of these names.
    """
    named = {name: wide(p) for name, p in model.named_parameters()} | dict(values or {})
    with torch.autocast(labels.device.type, enabled=False):
        return functional_call(Losses(model), {f"model.{n}": v for n, v in named.items()}, (inputs, labels))
