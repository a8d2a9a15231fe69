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
    A task with none of the classes to choose from is least sure.
    """
    logs = logits.float().log_softmax(2)
    entropy = torch.where(logs.isneginf(), 0.0, -logs.exp() * logs).sum(2)
    return entropy.masked_fill(logits.isneginf().all(2), torch.inf).argmin(0)


def surest(model: GeneratedClassifier, inputs: Tensor) -> Tensor:
    """Logits (B, C) of each sample by the task that predicts it with least entropy.

    Text (B, tokens) of a target that writes: by the task that is surest of the first token.
    """
    slots = range(len(model.codes))
    if model.writes:
        return of_slots(model, inputs, least_entropy(torch.stack([model.first_token(inputs, s) for s in slots])))
    logits = torch.stack([model.of_slot(inputs, s) for s in slots])  # (T, B, C)
    return logits[least_entropy(logits), torch.arange(len(inputs), device=inputs.device)]


def of_slots(model: GeneratedClassifier, inputs: Tensor, slots: Tensor) -> Tensor:
    """Logits (B, C), or text (B, tokens), of each sample by the task at its place in `slots` (B,)."""
    chosen = slots.unique().tolist()
    rows = torch.cat([(slots == slot).nonzero()[:, 0] for slot in chosen])
    return torch.cat([model.of_slot(inputs[slots == slot], slot) for slot in chosen])[rows.argsort()]


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
