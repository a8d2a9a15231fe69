"""ACU: analytic continual unlearning; samples leave the sums of ACIL, and the head is that of what is left.

Source   Tang et al., "ACU", 2025, arXiv:2505.12239. Only its abstract and introduction could be read; the equations are
         derived from the least-squares problem, whose minimiser is unique, so an ACU with the same features and γ gives
         the same head. That a request brings its own data is taken from the abstract.
    A ← A − Xᵀ X,   B ← B − Xᵀ Y,   W = (A + γI)⁻¹ B            X, Y the features and labels to erase
    small requests, with R = (A + γI)⁻¹ kept:   V = R Xᵀ,   S = I − X V,   W ← W − V S⁻¹ (Y − X W),   R ← R + V S⁻¹ Vᵀ
Differs  features are rounded to multiples of 2^-bits, so that A and B after a request are, bit for bit, those of a
         learner that never saw what was erased. A class without samples predicts −inf (its column of W is zero, which
         could win). Exact for the head alone: a backbone trained on the erased samples still is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat import Data, Experience, Kind
from clplat.components.frozen import frozen_features
from clplat.components.memory import Archive
from clplat.components.ridge import Ridge
from clplat.errors import UserError
from clplat.strategies.acil import ACIL


class ACU(ACIL):
    """Exact unlearning on ACIL. Shapes: B samples of a batch, n of a request, d expanded features, C classes.

    A request's features are set aside until all have come; then the sums and W change at once, and the features go.

    Args:
        width: d, as in `acil`.
        gamma: γ > 0, as in `acil`.
        bits: as in `acil`; needs max_j Σ h_j² below 2^(53 − 2 bits) over all samples learned. Null does not round: sums
            then keep traces of what was erased in their last bits.
        inverse: keep R besides, 8 d² bytes: requests of at most d/8 samples then take about 4 n d² operations instead
            of d³/3. Learning takes 2d³/3 more. Dropped while A is too ill-conditioned for an error of W below 1e-10.
        per_class: keep A of each class besides, 8 C d² bytes (C = 100: 0.8 GiB at d = 1024, 50 GiB at 8192): whole
            classes are then erased without their data.
    """

    kinds = frozenset({Kind.LEARN, Kind.FORGET})
    paper = "arXiv:2505.12239"
    unshardable = ""
    erasure = (
        "exact: the sums that the head comes from are (with `bits`, bit for bit) those of a learner that never saw "
        "what was erased; the head solved from them is so to rounding (3.6e-11 of its size, after all was erased); the "
        "backbone and the random expansion stay as they are"
    )
    data_access = "the samples to erase; with per_class none for whole classes"

    def __init__(
        self, *, width: int = 1024, gamma: float = 0.1, bits: int | None = 14, inverse: bool = True,
        per_class: bool = False, **base,
    ):  # fmt: skip
        super().__init__(width=width, gamma=gamma, bits=bits, **base)
        self.ridge = Ridge(width, gamma, bits=bits, inverse=inverse, per_class=per_class)
        self.request = Archive()  # features (n, k) and labels (n,) of the request under way

    def begin(self, experience: Experience) -> None:
        if experience.kind is Kind.LEARN:
            return super().begin(experience)
        if not self.whole:
            raise UserError("loop.max_steps: cut learning short, so what was learned is not known: leave it null")
        self.left.fill_(len(self.training_data(experience)))

    def training_data(self, experience: Experience) -> Data:
        """Of a request what is not erased by the statistics of whole classes."""
        data = super().training_data(experience)
        classes = self._by_statistics(experience)
        if not classes:
            return data
        targets = data.targets()
        return data.subset((~torch.isin(targets, targets.new_tensor(classes))).nonzero()[:, 0])

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch  # (B, ...), (B,)
        if self.left > 0:
            self.request.extend(*self._gathered(frozen_features(self.model, x, self.chunk), y))
            self.left -= self.global_batch

    def end(self, experience: Experience) -> None:
        if experience.kind is Kind.LEARN:
            return super().end(experience)
        if self.left > 0:
            raise UserError("loop.max_steps: cuts the request short: leave it null (nothing was erased)")
        counts, statistics = self.ridge.counts, self._by_statistics(experience)
        features = self.request.stored.get("inputs", torch.zeros(0, len(self.expansion), device=counts.device))
        labels = self.request.stored.get("labels", counts[:0])
        named = torch.bincount(labels, minlength=len(counts))
        if more := [c for c in experience.classes if c not in statistics and named[c] < counts[c]]:
            raise UserError(f"request: class {more[0]} is learned from more samples than the request names")
        self.ridge.remove(self._expanded(features), labels, statistics)
        self.request.stored = {}

    def measurements(self) -> dict[str, float]:
        return super().measurements() | {"answers_by_inverse": float(len(self.ridge.inverse) > 0)}

    def _by_statistics(self, experience: Experience) -> tuple[int, ...]:
        """Classes that a request erases as a whole, without their data."""
        asked = self.ridge.per_class and experience.kind is Kind.FORGET
        return experience.classes if asked else ()

    def _gathered(self, *own: Tensor) -> tuple[Tensor, ...]:
        """Rows of all processes, one after the other."""
        if self.world_size == 1:
            return own
        parts: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(parts, [t.cpu() for t in own])
        return tuple(torch.cat(rows).to(t.device) for rows, t in zip(zip(*parts, strict=True), own, strict=True))
