"""ER: experience replay from a reservoir.

Source   Chaudhry et al., "On Tiny Episodic Memories in Continual Learning", 2019, arXiv:1902.10486.
    loss = CE(f(x ∪ m; θ), y)        x new, m replayed: one forward pass, mean over all B + M
Differs  replayed samples are drawn with replacement; the draw comes before the batch is added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import Kind, Strategy, require
from clplat.components.memory import Reservoir


class ER(Strategy):
    """Experience replay. Shapes: B new samples, M replayed.

    Args:
        memory: samples kept in all, by reservoir sampling (as stored: before augmentation), ≥ 1.
        replay_batch: M, samples replayed in each step and process, ≥ 0; 0 makes this `naive`.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1902.10486"
    unshardable = ""
    plain_passes = True
    replays = True

    def __init__(self, *, memory: int = 500, replay_batch: int = 32, **base):
        super().__init__(**base)
        require("replay_batch", replay_batch, replay_batch >= 0, "≥ 0")
        self.memory, self.replay_batch = Reservoir(memory), replay_batch

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        new = y
        if self.replay_batch and len(self.memory):
            mx, my = self.memory.sample(self.replay_batch)  # (M, ...), (M,)
            x, y = torch.cat([x, self.prepare(mx)]), torch.cat([y, my])
        loss = self.mean_loss(x, y)
        self.memory.add(self.raw, new)
        return loss
