"""ER-ACE: replay in which new samples compete among the classes of their own batch only.

Source   Caccia et al., "New Insights on Reducing Abrupt Representation Change in Online Continual Learning", ICLR
         2022, arXiv:2104.05025.
Checked  against aimagelab/mammoth models/er_ace.py (e75a491, MIT).
    loss = CE(f(x; θ) over the classes in the batch, y) + CE(f(m; θ) over all classes met, y_m)    x new, m replayed
    So a new sample does not push down the logits, and features, of classes that are not in its batch.
Differs  any head (the authors' code has a cosine one); replay and restriction from the second batch of the first
         experience on, as the paper has no task boundaries (the code starts with the second task, where rows of classes
         still to come compete, too). One forward pass for both parts. Replayed samples are drawn with replacement.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Kind, Strategy, require
from clplat.components.losses import within
from clplat.components.memory import Reservoir
from clplat.strategy import tasks_of


class ERACE(Strategy):
    """Experience replay with asymmetric cross-entropy. B new samples, M replayed, C classes.

    Args:
        memory: samples kept in all, by reservoir sampling (as stored: before augmentation), ≥ 1.
        replay_batch: M, samples replayed in each step and process, ≥ 1.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:2104.05025"
    unshardable = ""
    plain_passes = True
    needs_classes = True
    replays = True

    def __init__(self, *, memory: int = 500, replay_batch: int = 32, **base):
        super().__init__(**base)
        require("replay_batch", replay_batch, replay_batch >= 1, "≥ 1")
        self.memory, self.replay_batch = Reservoir(memory), replay_batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        if len(self.memory) == 0:
            logits = self.model(x)  # (B, C)
            loss = self.mean(within(logits, self._present(y, logits.shape[1]), y))
        else:
            mx, my = self.memory.sample(self.replay_batch)  # (M, ...), (M,)
            inputs, task = torch.cat([x, self.prepare(mx)]), tasks_of(self.model, torch.cat([y, my]))
            new, old = self.model(inputs, task).split([len(x), len(mx)])  # (B, C), (M, C)
            loss = self.mean(within(new, self._present(y, new.shape[1]), y)) + F.cross_entropy(old, my)
        self.memory.add(self.raw, y)
        return loss

    def _present(self, labels: Tensor, classes: int) -> Tensor:
        """Which of the classes are in the batch of all processes together, (C,) bool."""
        counts = torch.bincount(labels, minlength=classes)
        if self.world_size > 1:
            torch.distributed.all_reduce(counts)
        return counts > 0
