"""A-GEM: a step that would raise the mean loss on remembered samples is projected so that it does not.

Source   Chaudhry et al., "Efficient Lifelong Learning with A-GEM", ICLR 2019, arXiv:1812.00420.
Checked  against aimagelab/mammoth models/agem.py (e75a491, MIT) and Avalanche 0.6.0 training/plugins/agem.py (MIT).
    g = ∇ CE(f(x; θ), y),   r = ∇ CE(f(m; θ), y_m)        x new, m drawn from the memory of earlier experiences
    g ← g − (g·r / r·r) r   where g·r < 0
Differs  the memory has room for `memory` samples in all, the same for each class met (theirs for so many of each
         class); it is filled when an experience ends, from the same samples at random. After clipping, which changes
         the length of g alone. With loop.accumulate r is of as many draws as g of batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.components.gradients import as_vector, overwrite, second_gradient
from clplat.components.memory import ClassBalanced
from clplat.components.per_parameter import trainable


def projected(gradient: Tensor, reference: Tensor) -> Tensor:
    """The vector (P,) nearest to `gradient` whose product with `reference` (P,) is not negative."""
    product = gradient @ reference
    return gradient - product / (reference @ reference) * reference if product < 0 else gradient


class AGEM(Strategy):
    """Averaged gradient episodic memory. B new samples, M remembered, P numbers of all trainable parameters.

    Args:
        memory: samples kept in all, the same number of each class (as stored: before augmentation), ≥ the number of
            classes.
        replay_batch: M, samples in each step and process that r is of, ≥ 1.
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1812.00420"
    unshardable = "it projects whole gradients"
    replays = True

    def __init__(self, *, memory: int = 500, replay_batch: int = 64, **base):
        super().__init__(**base)
        require("replay_batch", replay_batch, replay_batch >= 1, "≥ 1")
        self.memory, self.replay_batch = ClassBalanced(memory), replay_batch
        self._reference: Tensor | None = None  # r of the step under way; its length has no meaning

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        if len(self.memory):
            mx, my, _ = self.memory.sample(self.replay_batch)  # (M, ...), (M,)
            loss = self.losses(self.prepare(mx), my).mean()
            found = second_gradient(loss, list(trainable(self.model).values()), self.world_size)
            self._reference = found if self._reference is None else self._reference + found
        return self.mean_loss(x, y)

    @torch.no_grad()
    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._reference is not None:
            parameters = list(trainable(self.model).values())
            overwrite(parameters, projected(as_vector(parameters), self._reference))
            self._reference = None

    def end(self, experience: Experience) -> None:
        assert experience.train is not None
        self.memory.fill(experience.train)
