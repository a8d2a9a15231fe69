"""The loss of a task, as its model defines it.

Shapes: B samples of a batch, C classes, A tokens of an answer.
"""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


def losses(model: nn.Module, inputs: Tensor, labels: Tensor, task: int | None = None) -> Tensor:
    """Loss (B,) of each sample: the model's own `losses(inputs, labels)` where it has one, else cross-entropy.

    Args:
        inputs: (B, ...) prepared.
        labels: (B,) class ids; or (B, A) token ids where a stream's answers are free text.
        task: of the samples, for a model whose head asks for it.
    """
    own: Any = getattr(model, "losses", None)
    if own is not None:
        return own(inputs, labels)
    return F.cross_entropy(model(inputs) if task is None else model(inputs, task), labels, reduction="none")


class Losses(nn.Module):
    """`losses` as the forward pass of a module, for `torch.func.functional_call`; parameters are `model.<name>`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor, task: int | None = None) -> Tensor:
        """(B,) for inputs (B, ...) and labels."""
        return losses(self.model, inputs, labels, task)
