"""Which task a sample is of, where it is not told.

Shapes: T tasks met, B samples, C classes, M replayed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones.base import Backbone, Classifier
from clplat.backbones.heads import Growing
from clplat.components.generated import GeneratedClassifier
from clplat.components.memory import ClassBalanced
from clplat.stream import Experience, Kind


def least_entropy(logits: Tensor) -> Tensor:
    """For each sample the task whose prediction is surest, (B,) int64, from logits (T, B, C); -inf: no such class.

    By log_softmax: the logarithm of a softmax that underflows to 0 would make the entropy NaN, which argmin may take.
    """
    logs = logits.log_softmax(2)
    return torch.where(logs.isneginf(), 0.0, -logs.exp() * logs).sum(2).argmin(0)


def surest(model: GeneratedClassifier, inputs: Tensor) -> Tensor:
    """Logits (B, C) of each sample by the task that predicts it with least entropy."""
    logits = torch.stack([model.of_slot(inputs, s) for s in range(len(model.codes))])  # (T, B, C)
    return logits[least_entropy(logits), torch.arange(len(inputs), device=inputs.device)]


def of_slots(model: GeneratedClassifier, inputs: Tensor, slots: Tensor) -> Tensor:
    """Logits (B, C) of each sample by the task at its place in `slots` (B,)."""
    found = inputs.new_empty(len(inputs), model.target.classes)
    for slot in slots.unique().tolist():
        found[slots == slot] = model.of_slot(inputs[slots == slot], slot).to(found.dtype)
    return found


class TaskTeller(nn.Module):
    """A copy of a backbone that learns to tell tasks apart, with samples of earlier ones from a memory.

    Args:
        backbone: copied as it is now.
        memory: samples kept, ≥ 1, in equal parts of all tasks.
        replay_batch: M, of these in each step, ≥ 1.
    """

    def __init__(self, backbone: Backbone, memory: int, replay_batch: int) -> None:
        super().__init__()
        own = copy.deepcopy(backbone)
        self.net = Classifier(own, Growing(own.embed_dim, 2**31))  # as many rows as tasks are met
        self.memory, self.replay_batch = ClassBalanced(memory), replay_batch  # with tasks for classes

    def grow(self, tasks: int) -> None:
        """Make room for this many tasks."""
        self.net.grow(Experience(0, "tasks", Kind.LEARN, None, classes=(tasks - 1,)))

    def forward(self, inputs: Tensor) -> Tensor:
        """Places (B,) int64 of the tasks that prepared inputs (B, ...) are of."""
        return self.net(inputs).argmax(1)

    def loss(
        self, inputs: Tensor, raw: Tensor, task: int, mean: Callable[[Tensor], Tensor],
        prepare: Callable[[Tensor], Tensor],
    ) -> Tensor:  # fmt: skip
        """Cross-entropy on a batch, which is of one task, and on remembered samples; then the batch is remembered.

        Args:
            inputs: (B, ...) prepared.
            raw: the same as stored.
            mean: over the samples of all processes.
            prepare: stored inputs to prepared ones.
        """
        here = torch.full((len(inputs),), task, device=inputs.device)
        loss = mean(F.cross_entropy(self.net(inputs), here, reduction="none"))
        if len(self.memory):
            past, tasks = self.memory.sample(self.replay_batch)
            loss = loss + F.cross_entropy(self.net(prepare(past)), tasks)
        self.memory.add(raw, here)
        return loss
