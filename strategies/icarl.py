"""iCaRL: features learned by distillation and exemplars; the class is that of the nearest mean of exemplars.

Source   Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning", CVPR 2017, arXiv:1611.07725.
Checked  against Avalanche 0.6.0 training/supervised/icarl.py and training/losses.py (MIT).
    loss = mean_b −Σ_y [ t_y log g_y(x_b) + (1 − t_y) log(1 − g_y(x_b)) ],   g = σ(f(x; θ)),  y over all classes met
    t_y = σ(f_y(x; θ_old)) for classes of earlier experiences alone, 1[y = y_b] for those of this one
    epochs over the new samples and the exemplars;  exemplars by herding of φ / ‖φ‖ (components/herding.py)
    prediction argmin_y ‖ φ(x)/‖φ(x)‖ − μ_y/‖μ_y‖ ‖,   μ_y mean of φ/‖φ‖ over y's exemplars, when an experience ends
Differs  mean over samples, where the paper sums (both codes average over classes, too, and so have a rate of 2). The
         paper has each class in one experience; one that comes again is learned, not distilled, and herded from its
         exemplars and its new samples. No exemplar is chosen twice. No means over mirrored images, as in the codes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Data, Experience, Kind, Strategy
from clplat.components.ema import Frozen
from clplat.components.herding import Herded
from clplat.components.precision import wide
from clplat.components.prototypes import Prototypes
from clplat.components.stored import CHUNK
from clplat.strategy import evaluating, tasks_of


def binary_losses(logits: Tensor, labels: Tensor, teacher: Tensor | None, old: list[int], met: list[int]) -> Tensor:
    """Binary cross-entropies of each sample (B,), summed over the classes `met`.

    Args:
        logits: (B, C); −∞ where a sample can't be of a class, which is left out then.
        labels: (B,).
        teacher: logits (B, ·) that say what is true of the classes `old`.
    """
    targets = F.one_hot(labels, logits.shape[1]).to(wide(logits).dtype)
    if teacher is not None:
        known = wide(teacher[:, old])
        targets[:, old] = torch.where(known.isfinite(), known.sigmoid(), targets[:, old])
    z, targets = wide(logits[:, met]), targets[:, met]
    counts = z.isfinite()
    losses = F.binary_cross_entropy_with_logits(torch.where(counts, z, 0.0), targets, reduction="none")
    return torch.where(counts, losses, 0.0).sum(1)


class ICaRL(Strategy):
    """Incremental classifier and representation learning. B samples of a batch, D features, C classes.

    A class is predicted from the end of its first experience on, when it has exemplars.

    Args:
        memory: exemplars kept in all, the same number of each class (as stored: before augmentation), ≥ the number of
            classes.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1611.07725"
    unshardable = ""
    needs_classes = True
    replays = True

    def __init__(self, *, memory: int = 500, **base):
        super().__init__(**base)
        backbone: Any = self.model.backbone
        self.memory, self.prototypes = Herded(memory), Prototypes(backbone.embed_dim)
        self.teacher: Frozen | None = None
        self._old: list[int] = []  # distilled; these follow from the experiences met, which a resume replays
        self._met: list[int] = []
        self._tasks: list[int] = []
        self._tasks_before: list[int] = []

    def grow(self, experience: Experience) -> None:
        if self._met:
            self.teacher = Frozen(self.model)
        self._old = sorted(set(self._met) - set(experience.classes))
        self._met = sorted({*self._met, *experience.classes})
        self._tasks_before, self._tasks = self._tasks, sorted({*self._tasks, experience.task})
        self.prototypes.grow(max(self._met, default=-1) + 1)
        super().grow(experience)

    def training_data(self, experience: Experience) -> Data:
        return self.memory.joined(super().training_data(experience))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        logits, teacher = self._logits(self.model, x, self._tasks), None
        if self.teacher is not None and self._old:
            with torch.no_grad():
                teacher = self._logits(self.teacher.model, x, self._tasks_before)
        return self.mean(binary_losses(logits, y, teacher, self._old, self._met))

    def end(self, experience: Experience) -> None:
        """Choose exemplars and take their means. Every process does it whole, so that all agree."""
        assert experience.train is not None
        self.memory.fill(experience.train, self._embed)
        self.prototypes.totals.zero_()
        self.prototypes.counts.zero_()
        inputs, labels, _ = self.memory.everything()
        self.prototypes.add(self._embed(inputs), labels)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        features: Any = self.model.features
        return self.prototypes(features(inputs))  # (B, C): the greater the cosine, the nearer

    @staticmethod
    def _logits(model: Any, x: Tensor, tasks: list[int]) -> Tensor:
        """f(x) (B, C): each class by itself, and so, where the head has rows for each task, by those of its own."""
        if tasks_of(model, torch.zeros(0, dtype=torch.int64, device=x.device)) is None:
            return model(x)
        features = model.features(x)
        return torch.stack([model.head(features, task) for task in tasks]).amax(0)

    @torch.no_grad()
    def _embed(self, raw: Tensor) -> Tensor:
        """φ/‖φ‖ (n, D) of stored inputs (n, ...), in float64."""
        features: Any = self.model.features
        with evaluating(self):
            found = [features(self.prepare(part)).double() for part in raw.split(CHUNK)]
        return F.normalize(torch.cat(found), dim=1)
