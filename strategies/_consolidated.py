"""What strategies share that hold weights by a quadratic penalty, by how much the past needs each."""

from __future__ import annotations

from torch import Tensor

from clplat import Experience, Strategy, require
from clplat.components.consolidation import quadratic
from clplat.components.per_parameter import PerParameter, trainable


class Consolidated(Strategy):
    """Base: loss + λ Σ_i F_i (θ_i − c_i)² after the first experience. A subclass finds F and c at an experience's end.

    Args:
        penalty: λ ≥ 0, weight of the penalty; 0 makes this `naive`. Too large a λ diverges: lr · λ · F < 1 is needed.
    """

    unshardable = "importances of single weights, taken of whole gradients, stand beside them"

    def __init__(self, *, penalty: float = 1.0, **base):
        super().__init__(**base)
        require("penalty", penalty, penalty >= 0, "≥ 0")
        self.penalty = penalty
        self.importance, self.centre = PerParameter(self.model), PerParameter(self.model)  # F, c
        self._past = False

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.importance.grow(self.model)
        self.centre.grow(self.model)
        self._past = experience.index > 0

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        loss = self.mean_loss(x, y)
        if self._past and self.penalty:
            names = trainable(self.model)
            held = quadratic(list(names.values()), self.importance.of(names), self.centre.of(names))
            loss = loss + self.penalty * held
        return loss
