"""Cumulative: goes on training on everything seen so far; an upper bound without a memory limit.

Source   the usual "cumulative" baseline, as in Maltoni, Lomonaco, "Continuous Learning in Single-Incremental-Task
         Scenarios", 2018, arXiv:1806.08568.
    after experience k: epochs over D_0 ∪ … ∪ D_k, starting from the weights after k − 1
"""

from __future__ import annotations

from torch import Tensor

from clplat import Data, Experience, Kind, Strategy
from clplat.components.memory import Archive


class Cumulative(Strategy):
    """Goes on training on all data so far. Shapes: B samples of a batch.

    The data are stored, and every checkpoint holds them. An experience's epochs are longer by the data of the past.
    What an experience does to its inputs (a permutation, a rotation) is applied before they are stored.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1806.08568"
    unshardable = ""
    plain_passes = True
    replays = True
    unbounded_memory = True

    def __init__(self, **base):
        super().__init__(**base)
        self.seen = Archive()

    def begin(self, experience: Experience) -> None:
        assert experience.train is not None
        self.seen.extend(experience.train.all()[0], experience.train.targets())

    def training_data(self, experience: Experience) -> Data:
        return Data(self.seen.stored["inputs"], self.seen.stored["labels"])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean_loss(x, y)
