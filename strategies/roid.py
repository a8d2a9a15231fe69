"""ROID: certain, diverse samples raise their likelihood ratio; weights stay near the source, predictions near a prior.

Source   Marsden, Döbler, Yang, "Universal Test-time Adaptation through Weight Ensembling, Diversity Weighting, and
         Prior Correction", WACV 2024, arXiv:2306.00650.
Checked  against mariodoebler/test-time-adaptation classification/methods/roid.py, utils/losses.py (8b2ed63, MIT).
    p = softmax(f(x; θ)),   m ← 0.9 m + 0.1 mean p, uniform at first
    d = 1 − cos(m, p),  c = −H(p), each scaled to [0, 1] over the batch;  w = exp(d c / temperature), 0 where d < mean d
    loss = 1/B Σ_b w_b [ −Σ_k p_k log(p_k / (1 − p_k) + 10⁻⁵) + SCE(f(A(x_b); θ), f(x_b; θ)) ],   p_k ≤ 0.99
    SCE(z, t) = −½ Σ_k softmax(t)_k log softmax(z)_k − ½ Σ_k softmax(z)_k log softmax(t)_k
    after the step:  θ ← (1 − source_share) θ + source_share θ_0            θ: gains and offsets
    prediction ∝ p (π + s) / (1 + s C),   π mean p over the batch, s = max(1/B, 1/C) / max π
Differs  the prior weighs probabilities, as in the paper (their code multiplies logits by it, so that a negative one is
         made less likely by a larger prior). Augmentations are those of `cotta`. Where all of a batch are alike d or c
         is 0 (theirs is not a number). Evaluation has no prior, which would be that of the test set.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import require
from clplat.components.losses import entropy, symmetric
from clplat.components.precision import wide
from clplat.strategies._affine import NormStepping
from clplat.strategies._taught import Augmenting
from clplat.strategies._tta import laid_out

PROBABILITY_DECAY, HIGHEST, EPSILON = 0.9, 0.99, 1e-5


def likelihood_ratio(logits: Tensor) -> Tensor:
    """Soft likelihood ratio loss (B,) of logits (B, C), in single precision: 1 − p has few digits in bfloat16."""
    p = wide(logits).softmax(1).clamp(max=HIGHEST)
    return -(p * (p / (1 - p) + EPSILON).log()).sum(1)


def weights(probabilities: Tensor, uncertainty: Tensor, mean: Tensor, temperature: float) -> Tensor:
    """w (B,) of p (B, C), H (B,) and m (C,)."""
    diverse = _scaled(1 - F.cosine_similarity(mean[None], probabilities))
    w = (diverse * _scaled(-uncertainty) / temperature).exp()
    return w.masked_fill(diverse < diverse.mean(), 0.0)


def _scaled(values: Tensor) -> Tensor:
    """To [0, 1]; 0 where all are alike."""
    low, high = values.aminmax()
    return (values - low) / torch.where(high > low, high - low, 1.0)


def with_prior(logits: Tensor, whole: Tensor) -> Tensor:
    """Log-probabilities (b, C) of logits (b, C), weighed by the prior that those of the `whole` batch (B, C) tell."""
    prior, (count, classes) = whole.softmax(1).mean(0), whole.shape
    smooth = max(1 / count, 1 / classes) / prior.max()
    return (logits.log_softmax(1) + ((prior + smooth) / (1 + smooth * classes)).log()).log_softmax(1)


class ROID(Augmenting, NormStepping):
    """Weight ensembling, diversity weighting, prior correction. Images in [0, 1]. B images, C classes.

    Settings: Adam 1e-3 at batch 200 (CIFAR); sgd 2.5e-4, momentum 0.9 at batch 64 (ImageNet).

    Args:
        temperature: > 0, of the weights.
        source_share: in [0, 1], of the source's gains and offsets after each step; 1 never adapts.
    """

    paper = "arXiv:2306.00650"
    searched = {"temperature": (0.1, 1.0), "source_share": (0.001, 0.1, "log")}

    def __init__(self, *, temperature: float = 0.3333333333333333, source_share: float = 0.01, **base: Any) -> None:
        super().__init__(**base)
        require("temperature", temperature, temperature > 0, "> 0")
        require("source_share", source_share, 0 <= source_share <= 1, "in [0, 1]")
        self.temperature, self.source_share = temperature, source_share

    def _start(self) -> dict[str, Any]:
        return {"mean": None, "batches": 0}  # mean: m (C,)

    def _adapt(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.kept["batches"] += 1
        logits = self.model(x)  # (B, C)
        whole = self._all(logits.detach())
        w = self._own(self._weights(whole))
        kept = w > 0
        other = self.model(laid_out(self._augmented(x)[kept]))
        consistency = symmetric(other, logits[kept])
        losses = w * likelihood_ratio(logits)
        total = losses.sum() + (w[kept] * consistency).sum()
        return with_prior(logits.detach(), whole), total * (self.world_size / self._whole(x))

    def _weights(self, logits: Tensor) -> Tensor:
        """w of the whole batch, which m takes in."""
        p, before = wide(logits).softmax(1), self.kept["mean"]
        if before is None:
            before = torch.full_like(p[0], 1 / p.shape[1])
        if p.isfinite().all():
            self.kept["mean"] = before.lerp(p.mean(0), 1 - PROBABILITY_DECAY)
        return weights(p, entropy(logits), before, self.temperature)

    @torch.no_grad()
    def after_step(self) -> None:
        if self.adapting:
            for mine, source in self._pairs():
                mine.lerp_(source, self.source_share)
