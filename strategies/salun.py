"""SalUn: random labels for what is to be erased, and only the weights move that its loss is most sensitive to.

Source   Fan et al., "SalUn: Empowering Machine Unlearning via Gradient-based Weight Saliency in Both Image
         Classification and Generation", ICLR 2024, arXiv:2310.12508, equations 3 to 5.
Checked  against OPTML-Group/Unlearn-Saliency Classification/generate_mask.py and unlearn/RL.py.
    mask:    m_i = 1 where |g_i| ≥ γ and g_i ≠ 0,   g = ∂/∂θ mean CE(f(x_f; θ_o), y_f),   γ the median of all |g|
    request: θ = m ⊙ θ + (1 − m) ⊙ θ_o      x_f to erase, x_r retained, θ_o the model before the request
             loss = mean CE(f(x_f; θ), y') + α · mean CE(f(x_r; θ), y_r),      y' as in `random_labels`
Differs  as in `random_labels`, its parent (the code draws y' of all classes, y among them). Retained samples come from
         a memory, and beside those to erase (the code: first all of the one kind, then all of the other). A weight
         without gradient is never salient: where the median is 0, the paper's mask would take all weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat import Data, Experience, Kind, require
from clplat.components.gradients import second_gradient
from clplat.components.losses import single_losses
from clplat.components.per_parameter import PerParameter, trainable
from clplat.strategies.random_labels import RandomLabels
from clplat.strategy import evaluating


def salient(sizes: Tensor, share: float) -> Tensor:
    """Which of gradients' sizes (P,) are among the largest `share` of them, and not 0: (P,) bool."""
    count = max(1, int(len(sizes) * share))
    return (sizes >= sizes.kthvalue(len(sizes) - count + 1).values) & (sizes > 0)


class SalUn(RandomLabels):
    """Plain training; a request is answered by wrong labels on salient weights. B samples to erase, M replayed.

    Args:
        saliency: share of the weights that may move, in (0, 1]; 0.5 is the median.
        retain_weight: α ≥ 0, weight of the retained samples.
    """

    paper = "arXiv:2310.12508"
    unshardable = "it ranks single weights by whole gradients"
    searched = {"saliency": (0.1, 1.0), "retain_weight": (0.3, 3.0, "log")}
    erasure = "approximate: the erased data are taught under wrong labels, by some weights; no guarantee beyond that"

    def __init__(self, *, saliency: float = 0.5, retain_weight: float = 1.0, **base: Any):
        super().__init__(**base)
        require("saliency", saliency, 0 < saliency <= 1, "in (0, 1]")
        require("retain_weight", retain_weight, retain_weight >= 0, "≥ 0")
        self.saliency, self.retain_weight = saliency, retain_weight
        self.mask, self.origin = PerParameter(self.model), PerParameter(self.model)  # m and θ_o, zero between requests
        self.share = 0.0  # of the weights, salient in the last request
        self._requested = False  # follows from the experience under way, which a resume grows again

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self._requested = experience.kind is Kind.FORGET
        self.mask.grow(self.model)
        self.origin.grow(self.model)

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        if experience.kind is Kind.FORGET and experience.train is not None:
            self._choose(experience.train)

    def _choose(self, data: Data) -> None:
        """Set m and θ_o. Every process computes them whole, so that all agree."""
        named = trainable(self.model)
        parts = torch.arange(len(data), device=data.inputs.device).split(64)
        with evaluating(self):
            found = torch.stack([self._gradient(data, part) for part in parts]).sum(0).abs()
        chosen = salient(found, self.saliency)
        self.share = chosen.double().mean().item()
        sizes = [p.numel() for p in named.values()]
        masks = self.mask.of(named), chosen.split(sizes)
        with torch.no_grad():
            for mask, part in zip(*masks, strict=True):
                mask.copy_(part.view_as(mask))
            for origin, parameter in zip(self.origin.of(named), named.values(), strict=True):
                origin.copy_(parameter)

    def _gradient(self, data: Data, positions: Tensor) -> Tensor:
        """Of the summed loss of these samples, by the true labels, (P,)."""
        raw, labels = data.batch(positions)
        assert labels is not None
        loss = single_losses(self.model, self.prepare(raw), labels).sum()
        return second_gradient(loss, list(trainable(self.model).values()), 1)

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,) wrong labels
        replayed = self._replayed(self.replay_batch)
        if replayed is None:
            return self.mean_loss(x, y)
        found = self.losses(torch.cat([x, replayed[0]]), torch.cat([y, replayed[1]]))
        return self.mean(found[: len(x)]) + self.retain_weight * found[len(x) :].mean()

    @torch.no_grad()
    def after_step(self) -> None:
        if not self._requested:
            return
        named = trainable(self.model)
        for parameter, mask, origin in zip(named.values(), self.mask.of(named), self.origin.of(named), strict=True):
            parameter.copy_(torch.where(mask > 0, parameter, origin))

    def end(self, experience: Experience) -> None:
        super().end(experience)
        for kept in (*self.mask.values.values(), *self.origin.values.values()):
            kept.zero_()  # θ_o knew what was erased

    def measurements(self) -> dict[str, float]:
        return {"salient": self.share}

    def get_extra_state(self) -> dict[str, Any]:
        return super().get_extra_state() | {"share": self.share}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.share = state["share"]
