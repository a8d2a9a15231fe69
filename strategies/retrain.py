"""Retrain: train from scratch, without what was erased; the oracle that unlearning is measured against.

Source   the exact but costly answer in Bourtoule et al., "Machine Unlearning", IEEE S&P 2021, arXiv:1912.03817.
    learn experience:  epochs over D_k, as plain training
    request t:         θ ← θ_0, then epochs over all that is learned and not erased
Differs  one joint training on all retained data, however they were met; head rows start as they were when added. The
         same recipe in the order of the stream is any strategy on `clplat.erasure.counterfactual.counterfactual`.
"""

from __future__ import annotations

from torch import Tensor

from clplat import Data, Experience, Kind, Strategy
from clplat.components.ema import Frozen
from clplat.components.memory import Archive


class Retrain(Strategy):
    """On each request the weights it was built with, trained anew on all retained data. Shapes: B samples of a batch.

    All data are stored, and every checkpoint holds them, less what is erased. Weights that come from a start run are
    not gone back to, since that run may have seen what is erased.
    """

    kinds = frozenset({Kind.LEARN, Kind.FORGET})
    paper = "arXiv:1912.03817"
    unshardable = ""
    replays = True
    unbounded_memory = True
    unmergeable = "a request is answered by one training from the start, and would be exact no more"
    erasure = "exact: trained anew on retained data alone, from the weights it was built with (not a start run's)"

    def __init__(self, **base):
        super().__init__(**base)
        self.retained, self.initial = Archive(), Frozen(self.model)

    def before_start(self, weights: dict[str, Tensor]) -> None:
        self.initial.model.load_state_dict(weights)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.initial.grow(self.model)

    def begin(self, experience: Experience) -> None:
        assert experience.train is not None
        if experience.kind is Kind.LEARN:
            self.retained.fill(experience.train)
        else:
            self.retained.erase(experience)
            self.initial.copy_to(self.model)

    def training_data(self, experience: Experience) -> Data:
        if experience.kind is Kind.FORGET:
            return self.retained.data()
        return super().training_data(experience)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean_loss(x, y)

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """As in learning: the batch is of retained data."""
        return self.training_step(batch, batch_idx)
