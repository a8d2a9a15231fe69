"""SD-LoRA: what each task learned is kept as a direction, and how far to go along each is learned anew by every task.

Source   Wu et al., "SD-LoRA: Scalable Decoupled Low-Rank Adaptation for Class Incremental Learning", ICLR 2025,
         arXiv:2501.13198, of which the abstract, the figures and the authors' code were at hand.
Checked  against WuYichen-97/SD-Lora-CL backbone/lora.py (8bacded).
    h = W x + Σ_{i<t} α_i D_i x + α_t B_t A_t x,   D_i = B_i A_i / ‖B_i A_i‖_F
    trained: A_t, B_t and all α;  D_i stays;  after task t:  α_t ← α_t ‖B_t A_t‖_F, so that outputs stay as they are
    α_t = alpha / r when its task begins;   loss = CE over the classes of the experience
Differs  each layer has an α of its own (the code: one for all). The code divides by ‖A‖ ‖B‖, not by the norm of the
         product, and sets all α of the past back to 0.8 when a task begins, which changes what was learned: not
         followed. Its network for evaluation, which its run does not use, drops the past by writing over it. Without
         the variants of falling rank (RR) and of distilled directions (KD).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from clplat import Experience
from clplat.components.losses import own_losses
from clplat.strategies._lora import Adapted


def product_norm(a: Tensor, b: Tensor) -> Tensor:
    """‖B A‖_F of A (r, in) and B (out, r), a scalar in float64."""
    a, b = a.double(), b.double()
    return ((b.T @ b) * (a @ a.T)).sum().clamp(min=0).sqrt()


class SDLoRA(Adapted):
    """Scalable decoupled LoRA. One adapter for each experience, all in use, of which the last one learns.

    Args:
        alpha: α of a new adapter starts at alpha / r, > 0.
    """

    paper = "arXiv:2501.13198"
    unshardable = ""
    present: Tensor

    def __init__(self, *, rank: int = 10, alpha: float = 8.0, **base):
        super().__init__(rank=rank, alpha=alpha, **base)
        self.start = alpha / rank
        self.magnitudes: Any = nn.ModuleList()  # α of each adapter, and in it of each layer
        self.register_buffer("present", torch.zeros(self.model.num_classes, dtype=torch.bool))

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.present.zero_()
        self.present[list(experience.classes)] = True
        past = list(self.adapters.adapters)
        new = f"task{len(past)}"
        self.adapters.add(new)
        self.adapters.use(*past, new, train=new)
        # Parameters of one number, since what a layer is given must stay the same object on another device.
        like = self.adapters.parameters_of(new)[0]
        alphas = [nn.Parameter(torch.full_like(like[0, 0], self.start)) for _ in self.adapters.layers]
        self.magnitudes.append(nn.ParameterList(alphas))
        self.adapters.weigh(new, alphas)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean(own_losses(self.model, x, y, self.present))

    @torch.no_grad()
    def end(self, experience: Experience) -> None:
        """Make a direction of what was learned, and its length a part of its magnitude."""
        factors = self.adapters.factors(self.adapters.trained[0]).values()
        for (a, b), alpha in zip(factors, self.magnitudes[-1], strict=True):
            norm = product_norm(a, b)
            if norm > 0:  # a layer that has learned nothing has no direction
                b.copy_(b / norm)
                alpha.mul_(norm)

    def measurements(self) -> dict[str, float]:
        *past, new = [torch.stack(list(alphas)).detach().abs().mean() for alphas in self.magnitudes]
        return {"magnitude": float(new), "past_magnitude": float(torch.stack(past).mean()) if past else 0.0}
