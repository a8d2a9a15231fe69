"""Model Breadcrumbs: of what an experience changed the middle is kept, without the largest and the smallest changes.

Source   Davari, Belilovsky, "Model Breadcrumbs: Scaling Multi-Task Model Merging with Sparse Masks", ECCV 2024,
         arXiv:2312.06795.
Checked  by notes on the official code (rezazzr/breadcrumbs, no licence); the paper could not be read in full. Its final
         values were not seen: defaults are those of two re-implementations.
    τ = θ − θ_before;   of the d entries of a tensor, by |τ|: the ⌊drop_top d⌋ largest are zeroed, then all but the
    ⌊keep d⌋ largest of the rest;   θ ← θ_before + α m ⊙ τ,   kept entries are not rescaled
Differs  θ_before are the weights before the experience, the paper's the pretrained ones: the sum over tasks is the
         same, but each task begins from the merged model. Entries are ranked within a tensor, the paper's layer; in the
         code within each row (`per: row`). The head is left as learned (theirs are frozen).
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from clplat.components.merging._base import Anchored, require
from clplat.strategy import Strategy


def middle(change: Tensor, keep: float, drop_top: float) -> Tensor:
    """Which entries are kept, bool like `change` (..., d), ranked along the last axis."""
    d = change.shape[-1]
    top, kept = int(drop_top * d), int(keep * d)
    order = change.abs().argsort(dim=-1, descending=True, stable=True)
    return torch.zeros_like(change, dtype=torch.bool).scatter_(-1, order[..., top : top + kept], True)


class Breadcrumbs(Anchored):
    """Keeps the middle band of each tensor's changes, scaled.

    Args:
        alpha: α in [0, 1].
        keep: share of entries that are kept, in [0, 1]; of few entries maybe none.
        drop_top: share of entries that are too large, in [0, 1].
        per: what entries are ranked in: a whole tensor, or each row (its last axis).
    """

    paper = "arXiv:2312.06795"

    def __init__(
        self, *, alpha: float = 0.3, keep: float = 0.15, drop_top: float = 0.01,
        per: Literal["tensor", "row"] = "tensor", **base: Any,
    ) -> None:  # fmt: skip
        super().__init__(**base)
        require("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
        require("keep", keep, 0 <= keep <= 1, "in [0, 1]")
        require("drop_top", drop_top, 0 <= drop_top <= 1, "in [0, 1]")
        require("per", per, per in ("tensor", "row"), "tensor or row")
        self.alpha, self.keep, self.drop_top, self.per = alpha, keep, drop_top, per

    def merged(self, strategy: Strategy, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: self.alpha * self._kept(change) for name, change in changes.items()}

    def _kept(self, change: Tensor) -> Tensor:
        if change.ndim == 0:  # a single number is no layer
            return change
        ranked = change.reshape(1, -1) if self.per == "tensor" else change
        return torch.where(middle(ranked, self.keep, self.drop_top), ranked, 0.0).reshape(change.shape)
