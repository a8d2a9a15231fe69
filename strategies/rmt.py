"""RMT: a slow teacher by a symmetric loss, features drawn to source prototypes, and source images in every step.

Source   Döbler, Marsden, Yang, "Robust Mean Teacher for Continual and Gradual Test-Time Adaptation", CVPR 2023,
         arXiv:2211.13081, of which the abstract and the authors' code were at hand.
Checked  against mariodoebler/test-time-adaptation classification/methods/rmt.py (8b2ed63, MIT).
    SCE(z, t) = −½ Σ_k softmax(t)_k log softmax(z)_k − ½ Σ_k softmax(z)_k log softmax(t)_k
    loss = mean_b ½ [SCE(f(x_b; θ), t_b) + SCE(f(A(x_b); θ), t_b)] + a contrast + c CE of source images, t = f(x; θ')
    contrast: mean over images b and pairs i ≠ j of −log [exp(v_bi·v_bj / τ) / Σ_v exp(v_bi·v / τ)], v all but v_bi;
        v_b = g(p_b), g(φ(x_b)), g(φ(A(x_b))) of length 1, g trained; p_b source prototype next to φ(x_b) by cosine
    after the step:  θ' ← d θ' + (1 − d) θ;      prediction f(x; θ) + f(x; θ') before it
    warm-up: steps on SCE(f(s; θ), f(s; θ')) of source images s, at a rate that rises from 0; θ' follows
Differs  source images are those that a memory keeps of the learn experiences; prototypes are means over them, by the
         source model's own statistics (theirs: over all, by each batch's). Where there are none (weights from
         elsewhere) a, c and warm-up must be 0: the teacher alone is left. The published figures have a warm-up of
         50,000 images, 250 steps of 200. Augmentations are those of `cotta`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat import EMA, Experience, Frozen, require
from clplat.backbones.base import Classifier
from clplat.components.gradients import of_all, overwrite, second_gradient
from clplat.components.losses import contrast, symmetric
from clplat.components.norms import batch_of
from clplat.components.per_parameter import trainable
from clplat.strategies._sourced import Sourced
from clplat.strategies._tta import laid_out


class RMT(Sourced):
    """Robust mean teacher. Images in [0, 1]. B images, C classes, D features, P numbers of a projected one.

    Student and teacher predict together, in evaluation as well. Settings: Adam 1e-3 at batch 200 (CIFAR); sgd 0.01,
    momentum 0.9 at batch 64 (ImageNet).

    Args:
        slow_decay: d in [0, 1].
        contrast_weight: a ≥ 0; above 0 source images are needed.
        source_weight: c ≥ 0; above 0 source images are needed.
        temperature: τ > 0.
        projection: P ≥ 1; null takes features as they are.
        warmup_steps: before the first batch, ≥ 0; above 0 source images are needed.
    """

    paper = "arXiv:2211.13081"
    searched = {"contrast_weight": (0.0, 2.0), "source_weight": (0.0, 2.0), "temperature": (0.05, 0.5)}
    model: Classifier
    teacher: EMA
    needing = ("contrast_weight", "source_weight", "warmup_steps")

    def __init__(
        self, *, slow_decay: float = 0.999, contrast_weight: float = 1.0, source_weight: float = 1.0,
        temperature: float = 0.1, projection: int | None = 128, warmup_steps: int = 0, **base: Any,
    ) -> None:  # fmt: skip
        super().__init__(**base)
        require("slow_decay", slow_decay, 0 <= slow_decay <= 1, "in [0, 1]")
        require("contrast_weight", contrast_weight, contrast_weight >= 0, "≥ 0")
        require("source_weight", source_weight, source_weight >= 0, "≥ 0")
        require("temperature", temperature, temperature > 0, "> 0")
        require("projection", projection, projection is None or projection >= 1, "≥ 1 or null")
        possible = warmup_steps == 0 if self.reset_at != "never" else warmup_steps >= 0
        require("warmup_steps", warmup_steps, possible, "≥ 0, and 0 with a reset, which knows the source model alone")
        self.contrast_weight, self.source_weight, self.temperature = contrast_weight, source_weight, temperature
        self.warmup_steps = warmup_steps
        self.teacher = EMA(self.model, slow_decay, warmup=False)
        width, p = self.model.backbone.embed_dim, projection
        layers = [] if p is None else [nn.Linear(width, p), nn.ReLU(), nn.Linear(p, p)]
        self.projector = nn.Sequential(*layers).requires_grad_(False)
        self.first = Frozen(self.projector)  # to go back to

    def _chosen(self) -> Iterable[nn.Parameter]:
        return self.model.parameters()

    def _start(self) -> dict[str, Any]:
        return {"batches": 0}

    def _restore_source(self) -> None:
        super()._restore_source()
        self.first.copy_to(self.projector)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.projector.requires_grad_(self.adapting and self.contrast_weight > 0)

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        if self._entering and self.warmup_steps:
            self._warm_up()

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        found = super().predict(inputs, task)
        return found + self.model.predict(inputs, task) if self.adapting else found

    def _adapt(self, x: Tensor) -> tuple[Tensor, Tensor]:
        self.kept["batches"] += 1
        features, other = self.model.features(x), self.model.features(laid_out(self._augmented(x)))
        logits, target = self.model.head(features), self.teacher(x)  # (B, C)
        loss = self.mean((symmetric(logits, target) + symmetric(self.model.head(other), target)) / 2)
        if self.contrast_weight:
            loss = loss + self.contrast_weight * self._contrast(features, other)
        if self.source_weight:
            s, labels, factor = self._drawn()
            losses = F.cross_entropy(self.model(s), labels, reduction="none")
            loss = loss + self.source_weight * factor * losses.sum()
        return logits + target, loss

    def after_step(self) -> None:
        if self.adapting:
            self.teacher.update(self.model)

    def _warm_up(self) -> None:
        """Steps of the student after the teacher on source images; what the optimizer has gathered stays."""
        stepper, trained = self.configure_optimizers(), list(trainable(self.model).values())
        for k in range(self.warmup_steps):
            for group in stepper.param_groups:
                group["lr"] = self.adapt_lr * ((k + 1) / self.warmup_steps)
            s, _, factor = self._drawn()
            with batch_of(shared=self.world_size > 1), torch.enable_grad():
                loss = factor * symmetric(self.model(s), self.teacher(s)).sum()
            overwrite(trained, second_gradient(loss, trained, self.world_size))
            stepper.step()
            stepper.zero_grad()
            self.teacher.update(self.model)
        self._moments = stepper.state_dict()

    def _contrast(self, features: Tensor, other: Tensor) -> Tensor:
        """Of features (b, D) of images and of augmented ones, over the images of all processes."""
        with torch.no_grad():
            cosines = F.normalize(features) @ F.normalize(self.prototypes).T  # (b, C)
            near = self.prototypes[cosines.masked_fill(~self.prototypes.any(1), -torch.inf).argmax(1)]
        views = F.normalize(self.projector(torch.stack([near, features, other], 1)), dim=2)  # (b, 3, P)
        return contrast(of_all(views, self.world_size).transpose(0, 1), self.temperature)
