"""LIFT: only a weight's principal entries learn, those that are largest in its approximation of low rank.

Source   Liu et al., "LIFT the Veil for the Truth: Principal Weights Emerge after Rank Reduction for Reasoning-Focused
         Supervised Fine-Tuning", ICML 2025, arXiv:2506.00772.
Checked  by reading zihanghliu/LIFT, which was not run: its scripts ask for "lift_sparse", with which its code takes the
         smallest entries, against the paper. Here the largest are taken.
    W' = Σ_{i≤R} σ_i u_i v_iᵀ of each W (m, n);   M: the k entries with the largest |W'|,   k = min((m + n) r, m n)
    dW ← M ∘ dW;   M anew before an experience and every so many steps, and moments are 0 outside it
Differs  the paper has one task. Moments are kept as large as the weights, zero outside M, so that no memory is saved
         (the code keeps k numbers); the steps are the same. No weight decay, which would reach entries outside M (the
         code's has no effect). The backbone's other parameters are frozen; the head, if there is one, learns.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from clplat import Experience, Kind, Strategy, require
from clplat.backbones.base import Classifier, Role
from clplat.components.per_parameter import attribute
from clplat.components.precision import wide
from clplat.errors import UserError


def principal(weight: Tensor, approximation: int, count: int) -> Tensor:
    """M (m, n) bool of a weight (m, n): the `count` entries largest in its approximation of rank R."""
    u, s, vt = torch.linalg.svd(wide(weight), full_matrices=False)
    size = ((u[:, :approximation] * s[:approximation]) @ vt[:approximation]).abs().flatten()
    chosen = torch.zeros_like(size, dtype=torch.bool)
    chosen[size.argsort(descending=True, stable=True)[:count]] = True  # of equal ones the first, in every process
    return chosen.view_as(weight)


class LIFT(Strategy):
    """Sparse fine-tuning of linear layers.

    Args:
        rank: r ≥ 1: as many entries of a weight learn as an adapter of this rank has.
        approximation: R ≥ 1, of the approximation by which they are chosen.
        interval: steps after which they are chosen anew within an experience, ≥ 1; null: never.
        roles: of the layers that learn.
        optimizer: sgd, adam or adamw; made anew for each experience.
        lr: learning rate, > 0.
        weight_decay: 0.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2506.00772"
    unshardable = "it ranks single weights by a decomposition of whole ones"
    searched = {"lr": (1e-5, 1e-2, "log"), "approximation": [8, 16, 32]}
    model: Classifier
    steps: Tensor
    overlap: Tensor

    def __init__(
        self,
        *,
        model: Classifier,
        rank: int = 16,
        approximation: int = 16,
        interval: int | None = 400,
        roles: list[Role] = ["attention", "ffn"],  # noqa: B006
        optimizer: Literal["sgd", "adam", "adamw"] = "adamw",
        lr: float = 2e-4,
        weight_decay: float = 0.0,
        **base,
    ):
        super().__init__(model=model, optimizer=optimizer, lr=lr, weight_decay=weight_decay, **base)
        require("rank", rank, rank >= 1, "≥ 1")
        require("approximation", approximation, approximation >= 1, "≥ 1")
        require("interval", interval, interval is None or interval >= 1, "≥ 1, or null")
        require("weight_decay", weight_decay, weight_decay == 0, "0: it would reach entries that do not learn")
        self.rank, self.approximation, self.interval = rank, approximation, interval
        backbone = model.backbone
        layers = {name: layer for role in roles for name, layer in backbone.layers(role).items()}
        if not layers:
            raise UserError(f"backbone: has no linear layers of role {' or '.join(roles)}{backbone.offered()}")
        self._weights = {layer.weight: name for name, layer in layers.items() if layer.weight.requires_grad}
        backbone.requires_grad_(False)
        self.masks = nn.ParameterDict()  # no buffers, which DDP by default sends to all processes in every forward pass
        for weight, name in self._weights.items():
            none = torch.zeros_like(weight, dtype=torch.bool)
            self.masks[attribute(name)] = nn.Parameter(none, requires_grad=False)
            weight.requires_grad_(True)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))  # of this experience
        self.register_buffer("overlap", torch.zeros(()))

    def begin(self, experience: Experience) -> None:
        self.steps.zero_()
        self._choose()

    @torch.no_grad()
    def _choose(self) -> None:
        same = total = 0
        for weight, mask in zip(self._weights, self.masks.values(), strict=True):
            count = min(sum(weight.shape) * self.rank, weight.numel())
            new = principal(weight, self.approximation, count)
            same, total = same + int((new & mask).sum()), total + count
            mask.copy_(new)
        self.overlap.fill_(same / max(total, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean_loss(x, y)

    def on_after_backward(self) -> None:
        """Before gradients are clipped, so that their norm is that of what learns."""
        for weight, mask in zip(self._weights, self.masks.values(), strict=True):
            if weight.grad is not None:
                weight.grad.mul_(mask)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        moments = getattr(optimizer, "optimizer", optimizer).state  # Fabric's wrapper has the user's inside
        for weight, mask in zip(self._weights, self.masks.values(), strict=True):
            for value in moments.get(weight, {}).values():
                if isinstance(value, Tensor) and value.shape == weight.shape:  # no count of steps
                    value.mul_(mask)

    def after_step(self) -> None:
        self.steps += 1
        if self.interval is not None and self.steps % self.interval == 0:
            self._choose()

    def measurements(self) -> dict[str, float]:
        """Share of the entries that learn now and were among those chosen the time before; 0 at first."""
        return {"overlap": float(self.overlap)}
