"""SAR: sharpness-aware entropy minimisation on reliable samples, with a way back when the model collapses.

Source   Niu et al., "Towards Stable Test-Time Adaptation in Dynamic Wild World", ICLR 2023, arXiv:2302.12400, equations
         2 to 5.
Checked  against mr-eggplant/SAR sar.py and sam.py (20f6e24, BSD-3).
    L(θ; x) = mean of H(x; θ) over the samples with H < E_0 = margin · ln C
    ε = rho ∇L / ‖∇L‖;  the step is along ∇ L(θ + ε), on those of the samples that are still reliable at θ + ε
    e ← 0.9 e + 0.1 L(θ + ε);  when e < collapse: back to the source, with an empty optimizer
Differs  no step is taken where no sample is reliable; a reset empties the running loss (theirs keeps it, and so resets
         again); the blocks left alone are told by their place in the backbone, not by name; evaluation
         mode (theirs is `training_mode`).
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat import require
from clplat.components.losses import entropy
from clplat.strategies._affine import NormStepping, norm_affine_below

DECAY = 0.9


class SAR(NormStepping):
    """Entropy minimisation that seeks flat minima. Shapes: B images, C classes.

    Settings: the defaults for ImageNet at batch 64 (ViT: adapt_lr 1e-3).

    Args:
        margin: E_0 in shares of ln C, > 0.
        rho: ≥ 0, length of the step up before the gradient is taken.
        collapse: ≥ 0, running loss in nats below which the model goes back to the source; 0 never.
        top: share in [0, 1) of the last blocks, rounded up, that with all after them stay as they are; null is the
            published choice: the last stage (a ResNet's layer4), a quarter where there is but one (3 of a ViT's 12).
    """

    paper = "arXiv:2302.12400"
    searched = {"margin": (0.2, 1.0), "rho": (0.01, 0.2, "log")}

    def __init__(
        self,
        *,
        margin: float = 0.4,
        rho: float = 0.05,
        collapse: float = 0.2,
        top: float | None = None,
        adapt_optimizer: Literal["sgd", "adam"] = "sgd",
        adapt_lr: float = 0.00025,
        **base: Any,
    ) -> None:
        super().__init__(adapt_optimizer=adapt_optimizer, adapt_lr=adapt_lr, **base)
        require("top", top, top is None or 0 <= top < 1, "in [0, 1), or null")
        require("margin", margin, margin > 0, "> 0")
        require("rho", rho, rho >= 0, "≥ 0")
        require("collapse", collapse, collapse >= 0, "≥ 0")
        self.margin, self.rho, self.collapse, self.top = margin, rho, collapse, top
        require("top", top, bool(self._chosen()), "less: no normalisation layer is left to adapt")
        self._climbed: list[tuple[nn.Parameter, Tensor]] = []  # only within a step

    def _start(self) -> dict[str, Any]:
        return {"loss": None, "resets": 0}

    def _chosen(self) -> list[nn.Parameter]:
        return norm_affine_below(self.model, self.top)

    def _adapt(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = self.model(x)  # (B, C)
        limit, uncertainty = self.margin * math.log(logits.shape[1]), entropy(logits)
        reliable = uncertainty.detach() < limit
        loss = self._mean_of(uncertainty, reliable)
        chosen = [p for p in self.model.parameters() if p.requires_grad]
        if loss is None or not chosen:
            return logits, loss
        self._climb(chosen, torch.autograd.grad(loss, chosen))
        uncertainty = entropy(self.model(x))
        loss = self._mean_of(uncertainty, reliable & (uncertainty.detach() < limit))
        if loss is None or not self._finite(loss):
            self._descend()
        else:
            self._follow(float(self._sum(loss.detach()) / self.world_size))
        return logits, loss

    @torch.no_grad()
    def _climb(self, chosen: list[nn.Parameter], gradients: tuple[Tensor, ...]) -> None:
        """θ to θ + ε. The gradient is averaged over processes by hand: DDP does so in backward passes only."""
        flat = self._sum(torch.cat([g.flatten() for g in gradients])) / self.world_size
        steps = (flat * (self.rho / (flat.norm() + 1e-12))).split([p.numel() for p in chosen])
        self._climbed = [(p, p.detach().clone()) for p in chosen]
        for p, step in zip(chosen, steps, strict=True):
            p.add_(step.view_as(p))

    @torch.no_grad()
    def _descend(self) -> None:
        """Back to θ, bit for bit."""
        for p, before in self._climbed:
            p.copy_(before)
        self._climbed = []

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._descend()

    def _follow(self, loss: float) -> None:
        before = self.kept["loss"]
        self.kept["loss"] = loss if before is None else DECAY * before + (1 - DECAY) * loss

    def after_step(self) -> None:
        if self.adapting and self.kept["loss"] is not None and self.kept["loss"] < self.collapse:
            resets = self.kept["resets"] + 1
            self._reset()
            self.kept["resets"] = resets

    def measurements(self) -> dict[str, float]:
        return {"resets": float(self.kept["resets"])} if self.adapting else {}
