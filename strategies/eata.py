"""EATA: entropy minimisation on reliable and non-redundant samples, held near the source by its Fisher information.

Source   Niu et al., "Efficient Test-Time Model Adaptation without Forgetting", ICML 2022, arXiv:2204.02610, equations
         2 to 9.
Checked  against mr-eggplant/EATA eata.py and main.py (f739b36, MIT).
    S(x) = exp(E_0 − H(x)) · 1[H(x) < E_0] · 1[|cos(f(x), m)| < d]      E_0 = margin · ln C
    loss = mean of S(x) H(x) over the samples with S > 0, plus fisher_weight · Σ_i F_i (θ_i − θ_i⁰)²
    m ← 0.9 m + 0.1 mean f(x) over those samples;  F: mean over batches of 64 of their squared gradient of the
    cross-entropy with the source model's own labels
Differs  the source images that F needs are those of the last learn experience; layer norms adapt too; evaluation
         mode (theirs is `training_mode`).
         No step is taken on a batch without a chosen sample.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Experience, Kind, require
from clplat.components.losses import entropy
from clplat.components.norms import batch_of, norm_affine, set_statistics
from clplat.components.per_parameter import PerParameter
from clplat.components.precision import wide
from clplat.errors import UserError
from clplat.strategies._affine import NormStepping
from clplat.strategies._tta import mended

FISHER_BATCH, PROBABILITY_DECAY = 64, 0.9


class EATA(NormStepping):
    """ETA where `fisher_weight` is 0. Shapes: B images, C classes.

    Settings: the defaults for CIFAR-10, redundancy 0.1 for CIFAR-100; for ImageNet sgd 2.5e-4 with momentum 0.9,
    redundancy 0.05, fisher_weight 2000.

    Args:
        margin: E_0 in shares of ln C, > 0.
        redundancy: d in (0, 1], of the cosine to the mean prediction; above 1 nothing is redundant.
        fisher_weight: β ≥ 0; above 0 source images are needed, of a learn experience before.
        fisher_samples: source images for F, ≥ 1.
    """

    paper = "arXiv:2204.02610"
    searched = {"margin": (0.2, 1.0), "redundancy": (0.05, 0.8), "fisher_weight": (0.1, 100.0, "log")}

    def __init__(
        self,
        *,
        margin: float = 0.4,
        redundancy: float = 0.4,
        fisher_weight: float = 1.0,
        fisher_samples: int = 2000,
        **base: Any,
    ) -> None:
        super().__init__(**base)
        require("margin", margin, margin > 0, "> 0")
        require("redundancy", redundancy, redundancy > 0, "> 0")
        require("fisher_weight", fisher_weight, fisher_weight >= 0, "≥ 0")
        require("fisher_samples", fisher_samples, fisher_samples >= 1, "≥ 1")
        self.margin, self.redundancy = margin, redundancy
        self.fisher_weight, self.fisher_samples = fisher_weight, fisher_samples
        self.fisher = PerParameter(torch.nn.Module())
        self.register_buffer("has_fisher", torch.tensor(False))

    has_fisher: Tensor

    def _start(self) -> dict[str, Any]:
        return {"mean": None, "chosen": 0, "seen": 0}  # mean: m (C,)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        if self.adapting or self.fisher_weight:  # F is measured when learning ends: what a resume loads has its place
            self.fisher.grow(self.model)

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        if self.adapting and self.fisher_weight and not self.has_fisher:
            raise UserError(
                f"strategy.fisher_weight: {self.fisher_weight} needs source images, which the stream does not give "
                "(let a learn experience come first, or set 0, which is ETA)"
            )

    def _adapt(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        logits = self.model(x)  # (B, C)
        uncertainty, predicted = entropy(logits), wide(logits.detach()).softmax(1)
        limit, mean = self.margin * math.log(logits.shape[1]), self.kept["mean"]
        chosen = uncertainty.detach() < limit
        if mean is not None:
            chosen = chosen & (F.cosine_similarity(mean[None], predicted).abs() < self.redundancy)
        weight = (limit - uncertainty.detach()).exp()
        loss = self._mean_of(weight * uncertainty, chosen)
        self._follow(predicted, chosen, self._whole(x))
        if loss is not None and self.fisher_weight:
            pull = sum((f * (p - s) ** 2).sum() for f, (p, s) in zip(self._fishers(), self._pairs(), strict=True))
            loss = loss + self.fisher_weight * pull
        return logits, loss

    def _follow(self, predicted: Tensor, chosen: Tensor, whole: int) -> None:
        """Take the chosen predictions of a batch into their running mean."""
        count = self._sum(chosen.sum())
        if count > 0:
            mean, before = self._sum(predicted[chosen].sum(0)) / count, self.kept["mean"]
            self.kept["mean"] = mean if before is None else before.lerp(mean, 1 - PROBABILITY_DECAY)
        self.kept["chosen"] += int(count)
        self.kept["seen"] += whole

    def measurements(self) -> dict[str, float]:
        return {"chosen": self.kept["chosen"] / max(self.kept["seen"], 1)} if self.adapting else {}

    # --- Fisher information -------------------------------------------------------------------------------------------

    def _fishers(self) -> list[Tensor]:
        return self.fisher.of(name for name, p in self.model.named_parameters() if p.requires_grad)

    def end(self, experience: Experience) -> None:
        super().end(experience)
        if experience.kind is Kind.LEARN and self.fisher_weight:
            self._measure(experience)

    def _measure(self, experience: Experience) -> None:
        """F of gains and offsets on images of `experience`, with each batch's statistics; whole on every process."""
        data, wanted = self.training_data(experience), {id(p) for p in norm_affine(self.model)}
        names = [n for n, p in self.model.named_parameters() if id(p) in wanted and p.requires_grad]
        parameters = [self.model.get_parameter(n) for n in names]
        self.has_fisher.fill_(True)
        if not names:  # nothing that adapting moves
            return
        training = self.model.training
        self.model.eval()
        set_statistics(self.model, self.statistics)
        rows = torch.linspace(0, len(data) - 1, min(self.fisher_samples, len(data)), device=data.inputs.device).long()
        batches = rows.unique().split(FISHER_BATCH)
        totals = [torch.zeros_like(p) for p in parameters]
        with batch_of(), torch.enable_grad():
            for positions in batches:
                logits = self.model(mended(self.prepare(data.batch(positions)[0])))
                loss = F.cross_entropy(logits, logits.argmax(1))
                for total, gradient in zip(totals, torch.autograd.grad(loss, parameters), strict=True):
                    total += gradient**2
        for kept, total in zip(self.fisher.of(names), totals, strict=True):
            kept.copy_(total / len(batches))
        set_statistics(self.model, None)
        self.model.train(training)
