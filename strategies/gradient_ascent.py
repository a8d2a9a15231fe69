"""Gradient ascent: climb the loss on what is to be erased, up to a bound.

Source   the baseline GA of Thudi et al., "Unrolling SGD: Understanding Factors Influencing Machine Unlearning",
         EuroS&P 2022, arXiv:2109.13398; with replay NegGrad+ of Kurmanji et al., "Towards Unbounded Machine
         Unlearning", NeurIPS 2023, arXiv:2302.09880.
    request: loss = −mean min(CE(f(x; θ), y), bound) [+ CE(f(m; θ), y_m)]       x to erase, m replayed
Differs  each sample's loss is bounded: without a bound ascent has no end, and destroys the rest. From the bound on a
         sample has no gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import Kind, require
from clplat.components.losses import bounds, scored
from clplat.strategies._rehearsal import Rehearsal


class GradientAscent(Rehearsal):
    """Plain training; a request is answered by bounded gradient ascent. B samples to erase, M replayed, C classes.

    Args:
        bound: of a sample's loss, in nats, > 0; null takes 2 ln C, where its probability is 1 / C²; C of the classes,
            or of the answers to choose from, that compete.
        memory: samples kept in all for replay, ≥ the number of classes.
        replay_batch: M, retained samples learned beside each batch and process, ≥ 0; 0 only climbs.
    """

    kinds = frozenset({Kind.LEARN, Kind.FORGET})
    paper = "arXiv:2109.13398"
    unshardable = ""
    replays = True
    erasure = "approximate: the loss on the erased data is raised to a bound; no guarantee beyond what is measured"

    def __init__(self, *, bound: float | None = None, memory: int = 500, replay_batch: int = 0, **base):
        super().__init__(memory=memory, **base)
        require("bound", bound, bound is None or bound > 0, "> 0, or null")
        require("replay_batch", replay_batch, replay_batch >= 0, "≥ 0")
        self.bound, self.replay_batch = bound, replay_batch

    def forget_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        replayed = self._replayed(self.replay_batch)
        found = scored(self.model, *((x, y) if replayed is None else map(torch.cat, zip(batch, replayed, strict=True))))
        erased, cap = found.losses[: len(x)], bounds(found, self.bound)[: len(x)]
        loss = -self.mean(torch.where(erased < cap, erased, cap))
        return loss if replayed is None else loss + found.losses[len(x) :].mean()
