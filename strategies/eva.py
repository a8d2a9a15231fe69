"""EVA: an adapter begins with the directions in which the inputs of its layer vary most, and ranks follow the variance.

Source   Paischer et al., "Parameter Efficient Fine-tuning via Explained Variance Adaptation", NeurIPS 2025,
         arXiv:2410.07170. Its text was not read in full: what is here follows its equations and its code.
Checked  against peft 0.21 (`init_lora_weights="eva"`, Apache-2.0): same directions, ranks and scale.
    h = W x + s B A dropout(x),   s = alpha / r,   B = 0 at first
    before a task: principal components v_1, v_2, ... of a layer's inputs x, with shares of their variance
        e_i = λ_i / Σ_j λ_j          λ_i variance along v_i, inputs centred
    of all layers' first ⌊ρ r⌉ components the r L with the largest e (L layers): so many rows has a layer's A
    A = [v_1 ... v_k]ᵀ;   whitened: v_i / √σ_i,   σ_i = √((n − 1) λ_i)          n inputs of the layer
Differs  components are exact, of a number of samples that is told, one at a time (the code: incremental and truncated,
         of whole batches until they hold still). Each experience has an adapter of its own, beside those of the past
         (the paper has one task). Every adapter has room for ⌊ρ r⌉ rows: those that a layer did not get are 0, and stay
         so, since they have no gradient. A component without variance is never taken. Sums take 8 d² bytes of a layer
         with d inputs, while an experience begins.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import Experience, require
from clplat.strategies._calibrated import Calibrated


class Moments:
    """Σ x, Σ x xᵀ and the count of inputs x (d,) of one layer."""

    def __init__(self) -> None:
        self.count, self.total, self.products = 0, torch.zeros(()), torch.zeros(())

    def add(self, x: Tensor) -> None:
        """Inputs (n, d) in float64."""
        if not self.count:  # around the first inputs' mean: less is lost where a mean is far from 0
            self.shift = x.mean(0)
        x = x - self.shift
        self.count += len(x)
        self.total, self.products = self.total.to(x) + x.sum(0), self.products.to(x) + x.T @ x

    def components(self, most: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of at most `most` principal components, largest first: v (k, d), shares e (k,), singular values σ (k,)."""
        scatter = self.products - self.total.outer(self.total) / self.count  # (d, d)
        squares, vectors = torch.linalg.eigh(scatter)
        squares, vectors = squares.flip(0), vectors.T.flip(0)
        kept = squares[:most] > squares[0] * len(squares) * torch.finfo(squares.dtype).eps
        shares = squares[:most][kept] / squares.clamp(min=0).sum()
        return vectors[:most][kept], shares, squares[:most][kept].sqrt()


def ranks(shares: list[Tensor], budget: int) -> list[int]:
    """How many of each layer's components are among the `budget` largest shares of all; of equal ones the first."""
    owner = torch.cat([torch.full((len(s),), i) for i, s in enumerate(shares)])
    order = torch.cat([s.cpu() for s in shares]).argsort(descending=True, stable=True)
    return torch.bincount(owner[order[:budget]], minlength=len(shares)).tolist()


class EVA(Calibrated):
    """An adapter for each experience, begun by its data.

    Args:
        rank: r ≥ 1, mean rank of the layers' adapters.
        alpha: a change is scaled by alpha / r, > 0, whatever the rank of a layer.
        rho: ρ ≥ 1, so many times r a layer may have at most; 1 gives each r.
        whiten: divide each direction by the root of its singular value.
    """

    paper = "arXiv:2410.07170"
    unshardable = ""
    searched = {"rho": [1.0, 2.0], "whiten": [False, True]}

    def __init__(
        self,
        *,
        rank: int = 16,
        alpha: float = 1.0,
        dropout: float = 0.0,
        rho: float = 2.0,
        whiten: bool = False,
        lr: float = 5e-4,
        **base,
    ):
        require("rank", rank, rank >= 1, "≥ 1")
        require("rho", rho, rho >= 1, "≥ 1")
        room = round(rho * rank)
        super().__init__(rank=room, alpha=alpha * room / rank, dropout=dropout, lr=lr, **base)
        self.mean_rank, self.whiten = rank, whiten

    @torch.no_grad()
    def begin(self, experience: Experience) -> None:
        moments = {name: Moments() for name in self.adapters.layers}
        self._calibrate(experience, lambda name, x: moments[name].add(x))
        factors = self.adapters.factors(f"task{self.task}")
        met = {name: m.components(self.adapters.rank) for name, m in moments.items() if m.count}
        if not met:
            return
        counts = ranks([shares for _, shares, _ in met.values()], self.mean_rank * len(met))
        for (name, (vectors, _, sizes)), count in zip(met.items(), counts, strict=True):
            rows = vectors[:count] / sizes[:count, None].sqrt() if self.whiten else vectors[:count]
            factors[name][0].zero_()[:count] = rows.to(factors[name][0])

    def measurements(self) -> dict[str, float]:
        """Least and largest rank of a layer, in the experience that came last."""
        found = [int(a.any(1).sum()) for a, _ in self.adapters.factors(f"task{self.task}").values()]
        return {"least_rank": float(min(found)), "largest_rank": float(max(found))}
