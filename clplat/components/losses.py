"""The loss of a task, as its model defines it.

Shapes: B samples of a batch, C classes, A tokens of an answer.
"""

from __future__ import annotations

from torch import Tensor, nn

from clplat.strategy import losses


class Losses(nn.Module):
    """`losses` as the forward pass of a module, for `torch.func.functional_call`; parameters are `model.<name>`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, labels: Tensor, task: int | None = None) -> Tensor:
        """(B,) for inputs (B, ...) and labels."""
        return losses(self.model, inputs, labels, task)
