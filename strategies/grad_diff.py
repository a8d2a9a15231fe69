"""GradDiff: climb the loss on what is to be erased while descending it on what is retained.

Source   Liu et al., "Continual Learning and Private Unlearning", CoLLAs 2022, arXiv:2203.12817; under this name, for
         language models, Maini et al., "TOFU", COLM 2024, arXiv:2401.06121.
Checked  against locuslab/open-unlearning src/trainer/unlearn/grad_diff.py.
    request: loss = − mean ℓ(x_f, y_f; θ) + α · mean ℓ(x_r, y_r; θ)
             ℓ the loss of an answer, −log p(y | x; θ) of a class; (x_f, y_f) to erase, (x_r, y_r) retained
Differs  retained samples come from a memory filled while learning. A language model's ℓ is the mean over an answer's
         tokens, and the loss that over samples (theirs the mean over all tokens of a batch). The climb has no bound, as
         there: too long a request ruins the model (strategy `gradient_ascent` has one, and `npo` slows down by itself).
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor, cat

from clplat import Data, Experience, Kind, require
from clplat.strategies._paired import Paired


class GradDiff(Paired):
    """Plain training; a request is answered by steps on a difference of losses. B samples to erase, B retained.

    Here an epoch of a request runs over what is to be erased, and retained samples come round beside it.

    Args:
        retain_weight: α ≥ 0, weight of the retained samples.
        forget_optimizer: of a request.
        forget_lr: learning rate of a request, > 0.
    """

    paper = "arXiv:2203.12817"
    unshardable = ""
    searched = {"forget_lr": (1e-5, 1e-2, "log"), "retain_weight": (0.3, 10.0, "log")}
    erasure = "approximate: the loss on the erased data is raised without bound; no guarantee beyond what is measured"

    def __init__(
        self,
        *,
        retain_weight: float = 1.0,
        forget_optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        forget_lr: float = 1e-3,
        **base,
    ):
        super().__init__(forget_optimizer=forget_optimizer, forget_lr=forget_lr, **base)
        require("retain_weight", retain_weight, retain_weight >= 0, "≥ 0")
        self.retain_weight = retain_weight
        self._kept: Data | None = None  # what this request retains

    def training_data(self, experience: Experience) -> Data:
        """Of a request: what is to be erased, with what is retained beside it."""
        data = super().training_data(experience)
        if experience.kind is Kind.LEARN:
            return data
        assert self._erased is not None
        self._kept = data if self._retains else None
        return self._erased

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        if (beside := self._beside()) is None:
            return self.mean(self._forget(self.losses(x, y), x, y))
        losses = self.losses(cat([x, beside[0]]), cat([y, beside[1]]))
        erased, retained = losses[: len(x)], losses[len(x) :]
        return self.mean(self._forget(erased, x, y)) + self.retain_weight * self.mean(retained)

    def _beside(self) -> tuple[Tensor, Tensor] | None:
        """Prepared inputs (B, ...) and labels (B,) of the next retained samples; None where nothing is retained."""
        if self._kept is None:
            return None
        raw, labels = self._part(self._kept, self.drawn, self.global_batch)
        self.drawn += self.global_batch
        return self.prepare(raw), labels

    def _forget(self, losses: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """What is to be minimised (B,) of samples to erase, from their losses ℓ (B,)."""
        return -losses

    def end(self, experience: Experience) -> None:
        super().end(experience)
        self._kept = None
