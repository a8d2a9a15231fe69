"""InfLoRA: each task learns by inputs' directions of its own that past tasks did not need, which are chosen beforehand.

Source   Liang, Li, "InfLoRA: Interference-Free Low-Rank Adaptation for Continual Learning", CVPR 2024,
         arXiv:2404.00228, of which the abstract and the authors' code were at hand.
Checked  against liangyanshuo/InfLoRA methods/inflora.py (e08b00e).
    h = W x + s Σ_{i≤t} B_i A_i x,   A_t (r, d) chosen, B_t = 0 at first and trained (paper: B_t and A_t)
    before task t:  C = Σ x xᵀ over its inputs x of a layer,   (I − M) C = U S Vᵀ,   A_t = (u_1 ... u_r)ᵀ
    after it, C by the new weights:  M ← M + Σ_{i≤k} u_i u_iᵀ,   M the projector on what past tasks needed, 0 at first,
        k the least with  Σ_{i≤k} S_i² + ‖C‖² − Σ_i S_i² ≥ ε_t ‖C‖²,   ε_t = ε + (1 − ε) t / T,   t = 0, 1, ...
    loss = CE over the classes of the experience
Differs  the paper has the inputs x themselves in the place of C (`of: inputs`); its code, and so its ε, have C. DualGPM
         keeps a basis of M's space or of the rest, whichever is smaller: here M is kept, 8 d² bytes of a layer, and C
         while an experience begins or ends. Of the first task the code takes one direction less. A direction with less
         than 1.2e-7 of the largest variance is rounding: rows of A for which none is left are 0 (the code: any
         directions, past ones included). Inputs are not augmented for C, and summed over all processes. Adapters stay
         beside W (the paper adds them to it). In a fused projection the query learns, too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from clplat import Experience, require
from clplat.backbones.base import Projection
from clplat.components.losses import own_losses
from clplat.components.per_parameter import attribute
from clplat.components.sums import Sums
from clplat.strategies._calibrated import Calibrated
from clplat.strategies._once import shared

Of = Literal["covariance", "inputs"]


class Products(Sums):
    """C (d, d) of each layer, in float64."""

    def __init__(self, layers: Mapping[str, nn.Linear]) -> None:
        super().__init__()
        self.of = {
            name: torch.zeros(layer.in_features, layer.in_features, dtype=torch.float64, device=layer.weight.device)
            for name, layer in layers.items()
        }

    def add(self, name: str, x: Tensor) -> None:
        """Inputs (n, d) of a layer."""
        self.of[name].addmm_(x.T, x)

    def _sums(self) -> Iterator[Tensor]:
        yield from self.of.values()


def directions(c: Tensor, past: Tensor, of: Of) -> tuple[Tensor, Tensor]:
    """What C (d, d) has outside M's space (d, d): directions u (d, m), and the share of C that each has.

    The largest comes first, and the largest entry of each is positive.
    """
    rest = c - past @ c
    if of == "inputs":  # its singular values are the squares of those of (I − M) X / √n
        rest = rest - rest @ past
    u, s, _ = torch.linalg.svd(rest)
    kept = s > torch.finfo(torch.float32).eps * torch.linalg.matrix_norm(c, 2)
    u, s = u[:, kept], s[kept]
    u = u * u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    return u, s / c.trace() if of == "inputs" else s.square() / c.square().sum()


def extended(c: Tensor, past: Tensor, share: float, of: Of) -> Tensor:
    """M (d, d) with as many directions of C more as it takes to hold `share` of C."""
    u, shares = directions(c, past, of)
    held = 1 - shares.sum() + torch.cat([shares.new_zeros(1), shares.cumsum(0)])  # by 0, 1, ... of them
    u = u[:, : int((held < share).sum())]
    return past + u @ u.T


class InfLoRA(Calibrated):
    """Interference-free LoRA. d inputs of a layer.

    Settings of the paper: adam, cosine; ε 0.95 on CIFAR-100, 0.98 on ImageNet-R.

    Args:
        rank: r ≥ 1.
        alpha: s = alpha / r, > 0; null: s = 1/√3, as in code (the paper: 1).
        threshold: ε in (0, 1], share of the first task's inputs that later ones leave alone.
        tasks: T ≥ 1, experiences in which ε grows to 1, where it stays.
        of: covariance or inputs, what is decomposed.
        chunk: samples at a time that C is summed from, ≥ 1.
    """

    paper = "arXiv:2404.00228"
    unshardable = ""
    searched = {"dropout": None, "threshold": (0.9, 0.999)}
    present: Tensor

    def __init__(
        self, *, projections: list[Projection] = ["key", "value"], rank: int = 10,  # noqa: B006
        alpha: float | None = None, dropout: float = 0.0, samples: int | None = None, threshold: float = 0.95,
        tasks: int = 10, of: Of = "covariance", chunk: int = 32, lr: float = 5e-4, **base,
    ):  # fmt: skip
        require("rank", rank, rank >= 1, "≥ 1")
        require("threshold", threshold, 0 < threshold <= 1, "in (0, 1]")
        require("tasks", tasks, tasks >= 1, "≥ 1")
        require("of", of, of in get_args(Of), " or ".join(get_args(Of)))
        require("chunk", chunk, chunk >= 1, "≥ 1")
        scaled = {"rank": rank, "alpha": rank / 3**0.5 if alpha is None else alpha, "dropout": dropout}
        super().__init__(projections=projections, samples=samples, lr=lr, **scaled, **base)
        self.threshold, self.tasks, self.of, self.chunk = threshold, tasks, of, chunk
        self.adapters.holds_a = True
        self.spaces = nn.ParameterDict()  # M of each layer; no buffers, which DDP sends around at each step
        for name, c in Products(self.adapters.base_layers()).of.items():
            self.spaces[attribute(name)] = nn.Parameter(c, requires_grad=False)
        self.register_buffer("present", torch.zeros(self.model.num_classes, dtype=torch.bool))

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.present.zero_()
        self.present[list(experience.classes)] = True

    @torch.no_grad()
    def begin(self, experience: Experience) -> None:
        factors = self.adapters.factors(f"task{self.task}")
        for name, c in self._products(experience).items():
            rows = directions(c, self.spaces[attribute(name)], self.of)[0].T[: self.adapters.rank]
            factors[name][0].zero_()[: len(rows)] = rows.to(factors[name][0])

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean(own_losses(self.model, x, y, self.present))

    @torch.no_grad()
    def end(self, experience: Experience) -> None:
        share = min(self.threshold + (1 - self.threshold) * self.task / self.tasks, 1.0)
        for name, c in self._products(experience).items():
            space = self.spaces[attribute(name)]
            space.copy_(extended(c, space, share, self.of))

    def _products(self, experience: Experience) -> dict[str, Tensor]:
        """C of each layer that had inputs, by the weights as they are."""
        found = Products(self.adapters.base_layers())
        found.open(shared(self))
        self._calibrate(experience, found.add, self.chunk, share=True)
        found.gather()
        return {name: c for name, c in found.of.items() if c.any()}

    def measurements(self) -> dict[str, float]:
        """Share of the directions of all layers' inputs that is left alone from now on."""
        protected, of = zip(*((float(m.trace()), len(m)) for m in self.spaces.values()), strict=True)
        return {"protected": sum(protected) / sum(of)}
