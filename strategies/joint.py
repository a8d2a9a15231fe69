"""Joint: i.i.d. training on all data at once, anew at each experience; the upper bound.

Source   the usual "joint" or "multitask" bound, as in Li, Hoiem, "Learning without Forgetting", 2016, arXiv:1606.09282.
    at experience k: θ ← θ_0, then epochs over D_0 ∪ … ∪ D_k
Differs  published tables give the last row only; here each row is the bound of its time.
"""

from __future__ import annotations

from clplat import Experience, Kind
from clplat.components.ema import Frozen
from clplat.strategies.cumulative import Cumulative


class Joint(Cumulative):
    """Trains on all data so far, from the initial weights at each experience.

    Head rows start as they were when added. The data are stored, and every checkpoint holds them.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1606.09282"
    unshardable = ""
    plain_passes = True
    unmergeable = "it begins anew at each experience"

    def __init__(self, **base):
        super().__init__(**base)
        self.initial = Frozen(self.model)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.initial.grow(self.model)

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        self.initial.copy_to(self.model)
