"""What plain strategies of erasure share: ordinary training, and a memory of what was learned less what was erased."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clplat import Experience, Kind, Strategy
from clplat.components.memory import Archive, ClassBalanced


class Rehearsal(Strategy):
    """Plain training on what is to be learned; samples of it are kept, class-balanced, for when something is erased.

    Args:
        memory: samples kept in all, as stored (before augmentation), ≥ the number of classes; null keeps all.
    """

    def __init__(self, *, memory: int | None = 500, **base):
        super().__init__(**base)
        self.memory: Any = Archive() if memory is None else ClassBalanced(memory)

    def begin(self, experience: Experience) -> None:
        if experience.kind is Kind.FORGET:
            self.memory.erase(experience)  # from here on nothing that is erased is held
        elif experience.train is not None:
            self.memory.fill(experience.train)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean_loss(x, y)

    def _replayed(self, samples: int) -> tuple[Tensor, Tensor] | None:
        """Prepared inputs (M, ...) and labels (M,) of `samples` drawn ones; None where none are wanted or held."""
        if not samples or not len(self.memory):
            return None
        inputs, labels, _ = self.memory.sample(samples)
        return self.prepare(inputs), labels
