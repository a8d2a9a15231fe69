"""SCRUB: move away from what a teacher says of the samples to erase, and stay with it, and the labels, on the rest.

Source   Kurmanji et al., "Towards Unbounded Machine Unlearning", NeurIPS 2023, arXiv:2302.09880, equation 3 and
         algorithm 1.
Checked  against meghdadk/SCRUB thirdparty/repdistiller/helper/loops.py train_distill, both of its splits.
    d(x; θ) = T² · KL( softmax(f(x; θ_o)/T) ‖ softmax(f(x; θ)/T) )              θ_o: the model before the request
    max step: loss = − mean d(x_f; θ)                                           x_f to erase
    min step: loss = α · mean d(x_r; θ) + γ · mean CE(f(x_r; θ), y_r)           x_r retained
    an epoch: max steps once over what is to be erased, in the first epochs only; min steps over what is retained
Differs  retained samples come from a memory filled while learning. Max and min steps have one batch size, and the last
         batch of a pass is filled from the next one, so that an epoch may have a step less than the two passes apart.
         No rewinding (SCRUB+R), which needs held-out samples of what is to be erased. T = 1 is the paper's equation;
         its code has 2 or 4, and the factor T². An epoch's first step is a min step: at θ_o itself the
         gradient of d is zero but for rounding, which adam would scale up to whole steps, and sgd stay at.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Data, Experience, Kind, require
from clplat.components.losses import divergence
from clplat.components.precision import wide
from clplat.strategies._paired import Paired


class SCRUB(Paired):
    """Plain training; a request is answered by a student that leaves its teacher. B samples of a step.

    The loop's epochs of a request run over as many samples as are to be erased and retained together; this draws them.

    Args:
        max_epochs: epochs of a request that begin with max steps, ≥ 0.
        distill: α ≥ 0, weight of the teacher on retained samples.
        label_weight: γ ≥ 0, weight of the labels on retained samples.
        temperature: T > 0.
        forget_optimizer: of a request.
        forget_lr: learning rate of a request, > 0.
        forget_weight_decay: of a request, ≥ 0.
    """

    paper = "arXiv:2302.09880"
    unshardable = ""
    needs_classes = True
    compares = True
    erasure = "approximate: answers for the erased data leave those of before; no guarantee beyond what is measured"

    def __init__(
        self,
        *,
        max_epochs: int = 3,
        distill: float = 0.5,
        label_weight: float = 1.0,
        temperature: float = 1.0,
        forget_optimizer: Literal["sgd", "adam", "adamw"] = "adam",
        forget_lr: float = 5e-3,
        forget_weight_decay: float = 0.0,
        **base,
    ):
        super().__init__(
            forget_optimizer=forget_optimizer, forget_lr=forget_lr, forget_weight_decay=forget_weight_decay, **base
        )
        require("max_epochs", max_epochs, max_epochs >= 0, "≥ 0")
        require("distill", distill, distill >= 0, "≥ 0")
        require("label_weight", label_weight, label_weight >= 0, "≥ 0")
        require("temperature", temperature, temperature > 0, "> 0")
        self.max_epochs, self.distill = max_epochs, distill
        self.label_weight, self.temperature = label_weight, temperature
        self.retained = 0  # retained samples drawn so far in this request
        self.climbs = 0  # max steps in this epoch

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        self.retained = 0

    def training_data(self, experience: Experience) -> Data:
        """Of a request: what is to be erased and what is retained, which says how long an epoch is."""
        self._kept = data = super().training_data(experience)
        if experience.kind is Kind.LEARN or not self._retains:
            return data
        assert self._erased is not None
        (x, y), (kx, ky) = self._erased.all(), data.all()
        assert y is not None
        assert ky is not None
        return Data(torch.cat([x, kx]), torch.cat([y, ky]))

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor | None:
        if batch_idx == 0:
            self.epoch += 1
            assert self._erased is not None
            self.climbs = -(-len(self._erased) // self.global_batch) if self.epoch < self.max_epochs else 0
        if 0 < batch_idx <= self.climbs:
            return -self.mean(self._divergence(self.prepare(self._next(self.global_batch)[0])))
        if not self._retains:
            return None
        raw, y = self._part(self._kept, self.retained, self.global_batch)
        self.retained += self.global_batch
        x = self.prepare(raw)
        logits = self.model(x)  # (B, C)
        apart = self._divergence(x, logits)
        return self.mean(self.distill * apart + self.label_weight * F.cross_entropy(logits, y, reduction="none"))

    def _divergence(self, x: Tensor, logits: Tensor | None = None) -> Tensor:
        """d (B,) for prepared inputs (B, ...); their logits (B, C) where they are at hand."""
        assert self.before is not None
        student = self.model(x) if logits is None else logits
        soft = (wide(z) / self.temperature for z in (student, self.before(x)))
        return self.temperature**2 * divergence(*soft)

    def get_extra_state(self) -> dict[str, Any]:
        return super().get_extra_state() | {"retained": self.retained, "climbs": self.climbs}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.retained, self.climbs = state["retained"], state["climbs"]
