"""CorDA, preserving knowledge: an adapter takes over those parts of a weight that known inputs need least.

Source   Yang et al., "CorDA: Context-Oriented Decomposition Adaptation of Large Language Models", NeurIPS 2024,
         arXiv:2406.05223. Its text was not read in full: what is here follows its equations and its code.
Checked  against peft 0.21 (tuners/lora/corda.py, method "kpm", Apache-2.0): same factors.
    after a task:   C = mean over its samples of Xᵀ X / max|X|²            X (n, d) inputs of a layer W (o, d)
    before the next: C' = C + δ mean(diag C) I,   δ = 0.01, doubled until ‖C' C'⁻¹ − I‖_F < 0.05
        W C' = U S Vᵀ,   V̂ᵀ = Vᵀ C'⁻¹, so that W = U S V̂ᵀ;   of the r smallest of S
        B = U_r √(S_r / s),   A = √(S_r / s) V̂_rᵀ,   h = (W − s B₀ A₀) x + s B A dropout(x),   s = alpha / r
Differs  the knowledge to keep is what the run has learned before, by a C over all past experiences (the paper: one task
         after pretraining, C of questions about the world): so the first experience has a plain adapter, and a first
         experience of general text is the paper's case. W is what past adapters have made of it. −B₀ A₀ is a frozen
         adapter, and W is left as it is. The largest |X|, where the code has the absolute value of the largest X,
         which may be near 0. Rank 8 and a rate for it (their language models: 128, and 2e-5). C takes 4 d² bytes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat import Experience, require
from clplat.components.per_parameter import attribute
from clplat.strategies._calibrated import Calibrated


def decomposed(weight: Tensor, covariance: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """U (o, m), S (m,), V̂ᵀ (m, d) of a weight (o, d) and C (d, d), m = min(o, d); S falls."""
    eye = torch.eye(len(covariance), dtype=covariance.dtype, device=covariance.device)
    mean = covariance.diagonal().mean()
    damping = 0.01
    while True:
        damped = covariance + damping * mean * eye if mean > 0 else eye
        inverse = torch.linalg.inv(damped)
        if torch.dist(damped @ inverse, eye) < 0.05:
            break
        damping *= 2
    u, s, vt = torch.linalg.svd(weight @ damped, full_matrices=False)
    return u, s, vt @ inverse


class CorDA(Calibrated):
    """An adapter for each experience, begun from the weights' least needed parts.

    Args:
        rank: r ≥ 1, at most the smallest side of an adapted layer.
        alpha: a change is scaled by alpha / r, > 0; null: 1.
    """

    paper = "arXiv:2406.05223"
    unshardable = "it takes whole weights apart into factors"
    count: Tensor

    def __init__(self, *, rank: int = 8, alpha: float | None = None, dropout: float = 0.0, **base):
        super().__init__(rank=rank, alpha=alpha, dropout=dropout, **base)
        layers = self.adapters.base_layers()
        side = min(min(layer.weight.shape) for layer in layers.values())
        require("rank", rank, rank <= side, f"1 to {side}, the smallest side of an adapted layer")
        self.sums = (
            nn.ParameterDict()
        )  # Σ Xᵀ X / max|X|² of each layer; no buffers, which DDP sends around at each step
        for name, layer in layers.items():
            zeros = torch.zeros(layer.in_features, layer.in_features, device=layer.weight.device)
            self.sums[attribute(name)] = nn.Parameter(zeros, requires_grad=False)
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))  # samples in the sums

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        if self.task:
            start, now = f"start{self.task}", f"task{self.task}"
            self.adapters.add(start, dropout=0.0)
            self.adapters.use(*self.adapters.adapters, train=now)

    @torch.no_grad()
    def begin(self, experience: Experience) -> None:
        if not self.count:
            return
        now = f"task{self.task}"
        scale, rank = self.adapters.scale(now), self.adapters.rank
        taken, new = self.adapters.factors(f"start{self.task}"), self.adapters.factors(now)
        for name, weight in self._weights().items():
            u, s, vt = decomposed(weight, self.sums[attribute(name)].double() / self.count)
            root = (s[-rank:] / scale).sqrt()
            for (a, b), sign in ((new[name], 1), (taken[name], -1)):
                a.copy_(root[:, None] * vt[-rank:])
                b.copy_(sign * u[:, -rank:] * root)

    def _weights(self) -> dict[str, Tensor]:
        """W (o, d) of each layer with what past adapters have added, in float64."""
        found = {name: layer.weight.double() for name, layer in self.adapters.base_layers().items()}
        for adapter in self.adapters.adapters:
            if adapter not in (f"task{self.task}", f"start{self.task}"):
                found = {name: found[name] + change for name, change in self.adapters.delta(adapter).items()}
        return found

    @torch.no_grad()
    def end(self, experience: Experience) -> None:
        def take(name: str, x: Tensor) -> None:
            x = x / x.abs().max().clamp(min=torch.finfo(x.dtype).tiny)
            self.sums[attribute(name)] += x.T @ x

        self._calibrate(experience, take)
        assert experience.train is not None
        self.count += self._count(experience.train)
