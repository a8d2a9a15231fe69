"""SSD: dampen the weights that matter much more for what is to be erased than for everything; no training.

Source   Foster, Schoepf, Brintrup, "Fast Machine Unlearning without Retraining through Selective Synaptic Dampening",
         AAAI 2024, arXiv:2308.07707, equations 5 to 7.
Checked  against if-loops/selective-synaptic-dampening src/ssd.py.
    I(D)_i = mean over D of ( ∂ℓ(x, y; θ) / ∂θ_i )²             the diagonal of the empirical Fisher information
    request, once:  where I(D_f)_i > α · I(D)_i:   θ_i ← min( λ · I(D)_i / I(D_f)_i, 1 ) · θ_i        D_f to erase
Differs  D is a memory filled while learning, as it is before the request (`memory: null`: all that was learned). The
         gradient of each sample by itself, as in the paper (the code squares that of a batch's mean loss, so that I
         depends on its size). A language model's ℓ is the mean over an answer's tokens.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from clplat import Data, Experience, Kind, require
from clplat.components.per_parameter import trainable
from clplat.errors import UserError
from clplat.strategies._rehearsal import Rehearsal
from clplat.strategies.ewc import fisher
from clplat.strategy import evaluating


class SSD(Rehearsal):
    """Plain training; a request is answered by one change of weights. Frozen weights stay as they are.

    Args:
        alpha: α > 0: the larger, the fewer weights are dampened.
        dampening: λ ≥ 0: the smaller, the nearer to 0 they get.
        memory: samples kept in all, ≥ the number of classes; null keeps all.
    """

    kinds = frozenset({Kind.LEARN, Kind.FORGET})
    paper = "arXiv:2308.07707"
    unshardable = "importances of single weights, taken of whole gradients, stand beside them"
    searched = {"alpha": (1.0, 100.0, "log"), "dampening": (0.1, 5.0, "log")}
    replays = True
    data_access = "the samples to erase, and a memory of what was learned; no training"
    erasure = "approximate: weights that matter most for the erased data are dampened; no guarantee beyond that"

    def __init__(self, *, alpha: float = 10.0, dampening: float = 1.0, memory: int | None = 500, **base):
        super().__init__(memory=memory, **base)
        require("alpha", alpha, alpha > 0, "> 0")
        require("dampening", dampening, dampening >= 0, "≥ 0")
        self.alpha, self.dampening = alpha, dampening
        self.share = 0.0  # of the weights, dampened by the last request

    def begin(self, experience: Experience) -> None:
        if experience.kind is Kind.FORGET:
            if not len(self.memory):
                raise UserError("strategy: ssd compares with what was learned, but this run has learned nothing")
            assert experience.train is not None
            self._dampen(self._importance(self.memory.data()), self._importance(experience.train))
        super().begin(experience)

    def _importance(self, data: Data) -> dict[str, Tensor]:
        """I(data), by parameter name. Every process computes it whole, so that all agree."""
        inputs, labels = data.all()
        assert labels is not None
        with evaluating(self):
            return fisher(self.model, self.prepare(inputs), labels, 1, None)

    @torch.no_grad()
    def _dampen(self, everything: dict[str, Tensor], erased: dict[str, Tensor]) -> None:
        """One step of the method, from I(D) and I(D_f)."""
        changed = total = 0
        for name, parameter in trainable(self.model).items():
            whole, own = everything[name], erased[name]
            chosen = own > self.alpha * whole
            parameter.mul_(torch.where(chosen, (self.dampening * whole / own).clamp(max=1), 1.0))
            changed, total = changed + int(chosen.sum()), total + chosen.numel()
        self.share = changed / max(total, 1)
        if not changed:
            what = f"no weight matters {self.alpha:g} times as much for what is to be erased as for what was learned"
            warnings.warn(f"strategy.alpha: {what}: the request changes nothing", stacklevel=2)

    def training_data(self, experience: Experience) -> Data:
        """Of a request nothing: `begin` has answered it."""
        data = super().training_data(experience)
        return data if experience.kind is Kind.LEARN else data.subset(torch.arange(0, device=data.inputs.device))

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Never called, since a request has no batches."""

    def measurements(self) -> dict[str, float]:
        return {"dampened": self.share}

    def get_extra_state(self) -> dict[str, Any]:
        return {"share": self.share}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.share = state["share"]
