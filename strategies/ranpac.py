"""RanPAC: random projections of frozen features, and class prototypes decorrelated by a ridge that the data choose.

Source   McDonnell et al., "RanPAC: Random Projections and Pre-trained Models for Continual Learning", NeurIPS 2023,
         arXiv:2307.02251, without its first phase. How λ is chosen is taken from the authors' code.
Checked  against RanPAC/RanPAC RanPAC.py (012927f).
    h = relu(φ(x) E),  E_ij ~ N(0, 1);   G = Σ h hᵀ,   Q = Σ h yᵀ;   W = (G + λI)⁻¹ Q,   prediction argmax_j (h W)_j
    λ of each session: of 10⁻⁸ … 10⁸ the one whose W, from 80 % of the session's samples alone, has the least mean
    squared error on the other 20 %
    ‖Y − H W‖² = n − 2 ⟨W, Q⟩ + ⟨W, G W⟩     over n one-hot labels: the held-out part, too, is kept as sums alone
Differs  float64 and Cholesky factors, where the authors' code has float32 and LU; a λ without a factor is passed over.
         Which samples are held out follows from their rows (the code takes the last of a shuffled pass). No adaptation
         of the backbone to the first session (phase 1): give `start.run` one that was adapted.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

import torch
from torch import Tensor

from clplat import Experience, require
from clplat.components.ridge import Ridge
from clplat.components.sums import Sums
from clplat.errors import UserError
from clplat.strategies.acil import ACIL

LAMBDAS = [10.0**k for k in range(-8, 9)]
GOLDEN = 2654435769  # 2³² / golden ratio: its multiples, modulo 2³², spread any run of rows evenly


class RanPAC(ACIL):
    """Ridge regression on random projections. Shapes: B samples, k features, d expanded, C classes.

    Args:
        width: d, ≥ 1. Three matrices of 8 d² bytes, and 18 Cholesky factors of d³/3 operations after each session; the
            paper has 10000.
        gamma: λ > 0 of all sessions, or null: chosen anew after each.
        held_out: share of a session's samples that λ is chosen on, in (0, 1). Without any of them, or without any
            others, λ stays as it was (1 at first).
    """

    paper = "arXiv:2307.02251"
    unshardable = ""
    searched = {"gamma": None, "held_out": (0.1, 0.5)}
    chosen: Tensor

    def __init__(self, *, width: int = 1024, gamma: float | None = None, held_out: float = 0.2, **base):
        super().__init__(width=width, gamma=1.0 if gamma is None else gamma, bits=None, **base)
        require("held_out", held_out, 0 < held_out < 1, "in (0, 1)")
        self.choose, self.held_out = gamma is None, held_out
        self.fit, self.rest = Ridge(width, 1.0), Ridge(width, 1.0)  # sums of one session: learned from, and held out
        self.expansion.normal_()
        self.register_buffer("chosen", torch.tensor(self.ridge.gamma, dtype=torch.float64))  # λ

    def _open(self) -> Sequence[Sums]:
        return self.fit, self.rest

    def _take(self, features: Tensor, labels: Tensor) -> None:
        h, apart = self._expanded(features), held(self.rows, self.held_out).to(labels.device)
        self.fit.add(h[~apart], labels[~apart])
        self.rest.add(h[apart], labels[apart])

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.ridge.grow(len(self.fit.counts))

    def _solve(self) -> None:
        fit, rest = self.fit, self.rest
        lambdas = [float(self.chosen)]
        if self.choose and fit.counts.any() and rest.counts.any():
            errors = {x: error(fit, rest, x) for x in LAMBDAS}
            lambdas = sorted(LAMBDAS, key=errors.__getitem__)
        for part in (fit, rest):
            self.ridge.absorb(part)
        for gamma in lambdas:
            self.ridge.gamma = gamma
            with suppress(UserError):
                self.ridge.solve()
                self.chosen.fill_(gamma)
                return
        self.ridge.solve()  # raises

    def measurements(self) -> dict[str, float]:
        return super().measurements() | {"lambda": float(self.chosen)}


def held(rows: Tensor, share: float) -> Tensor:
    """Which samples of rows (B,) are held out, (B,) bool: always the same, and evenly spread over runs of rows."""
    return (rows.long() * GOLDEN) % 2**32 < share * 2**32


def error(fit: Ridge, rest: Ridge, gamma: float) -> float:
    """Error on the samples in `rest` of the W of those in `fit`; infinite where G + λI has no factor."""
    try:
        return fit.error(rest, gamma)
    except UserError:
        return torch.inf
