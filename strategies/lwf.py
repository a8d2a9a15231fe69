"""LwF: the model before this experience teaches the old classes on the new data.

Source   Li, Hoiem, "Learning without Forgetting", ECCV 2016, arXiv:1606.09282.
Checked  against Avalanche 0.6.0 training/regularization.py (MIT).
    loss = CE(f(x; θ), y) + α · mean_b KL( softmax(f_b(x; θ_old)/T) ‖ softmax(f_b(x; θ)/T) )        over old classes
    with replay_batch: x and replayed samples together, mean over all, in both terms
Differs  KL where the paper has cross-entropy (the same gradient); no warm-up of the new rows; with one head for all
         tasks both terms run over all classes met. With rows for each task (`head: taskwise`) an old task has a softmax
         of its own, as in the paper. Replay is an option that the paper has not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.components.ema import Frozen
from clplat.components.memory import Reservoir
from clplat.components.precision import wide
from clplat.strategy import tasks_of


def distillation(logits: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """KL(teacher ‖ student) of each sample (B,), both logits (B, C) softened by `temperature`."""
    student, target = ((wide(z) / temperature).log_softmax(1) for z in (logits, teacher))
    return F.kl_div(student, target, reduction="none", log_target=True).sum(1)


class LwF(Strategy):
    """Distillation, without a memory unless it is asked for. B new samples, M replayed, C classes, O of them old.

    Args:
        distill: α ≥ 0, weight of the distillation; 0 makes this `naive`.
        temperature: T > 0, softens both distributions.
        replay_batch: M, samples replayed in each step and process, ≥ 0; 0 keeps none.
        memory: samples kept in all where there is replay, by reservoir sampling (as stored: before augmentation), ≥ 1.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1606.09282"
    unshardable = ""
    searched = {"distill": (0.1, 10.0, "log"), "temperature": (1.0, 5.0)}
    needs_classes = True
    replays = True

    def __init__(
        self, *, distill: float = 1.0, temperature: float = 2.0, replay_batch: int = 0, memory: int = 500, **base
    ):
        super().__init__(**base)
        require("distill", distill, distill >= 0, "≥ 0")
        require("temperature", temperature, temperature > 0, "> 0")
        require("replay_batch", replay_batch, replay_batch >= 0, "≥ 0")
        self.distill, self.temperature, self.replay_batch = distill, temperature, replay_batch
        self.memory = Reservoir(memory) if replay_batch else None
        self.teacher: Frozen | None = None
        self._old: dict[int, list[int]] = {}  # by task; both follow from the experiences met, which a resume replays
        self._met: dict[int, set[int]] = {}

    def grow(self, experience: Experience) -> None:
        if self._met:
            self.teacher, self._old = Frozen(self.model), {t: sorted(c) for t, c in self._met.items()}
        self._met.setdefault(experience.task, set()).update(experience.classes)
        super().grow(experience)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        task = None
        if self.memory is not None:
            new = y
            if len(self.memory):
                mx, my = self.memory.sample(self.replay_batch)  # (M, ...), (M,)
                x, y = torch.cat([x, self.prepare(mx)]), torch.cat([y, my])
            self.memory.add(self.raw, new)
            task = tasks_of(self.model, y)
        logits = self.model(x, task) if task is not None else self.model(x)  # (B + M, C)
        losses = F.cross_entropy(logits, y, reduction="none")
        if self.teacher is not None and self.distill:
            losses = losses + self.distill * self._distilled(self.teacher, x, logits, y)
        return self.mean(losses)

    def _distilled(self, teacher: Frozen, x: Tensor, logits: Tensor, y: Tensor) -> Tensor:
        """(B,): over all old classes; where the head has rows for each task, over those of each old task by itself."""
        if tasks_of(self.model, y) is None:
            old = sorted(set().union(*self._old.values()))
            return distillation(logits[:, old], teacher(x)[:, old], self.temperature)
        student, master = self._with_features(self.model, x), self._with_features(teacher.model, x)
        return torch.stack([
            distillation(student(t)[:, old], master(t)[:, old], self.temperature) for t, old in self._old.items()
        ]).sum(0)  # fmt: skip

    @staticmethod
    def _with_features(model: Any, x: Tensor) -> Callable[[int], Tensor]:
        """Logits (B, C) by task, from one pass through the backbone."""
        features = model.features(x)
        return lambda task: model.head(features, task)
