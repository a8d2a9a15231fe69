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
import torch.nn.functional as F
from torch import Tensor

from clplat import Kind, require
from clplat.strategies._rehearsal import Rehearsal


def default_bound(logits: Tensor) -> float:
    """2 ln C for logits (B, C): the probability 1 / C², C classes that are not masked, at least 2."""
    classes = int((logits > -torch.inf).any(0).sum())
    return 2 * torch.tensor(float(max(classes, 2))).log().item()


class GradientAscent(Rehearsal):
    """Plain training; a request is answered by bounded gradient ascent. B samples to erase, M replayed, C classes.

    Args:
        bound: of a sample's cross-entropy, in nats, > 0; null takes 2 ln C, where its probability is 1 / C².
        memory: samples kept in all for replay, ≥ the number of classes.
        replay_batch: M, retained samples learned beside each batch and process, ≥ 0; 0 only climbs.
    """

    kinds = frozenset({Kind.LEARN, Kind.FORGET})
    paper = "arXiv:2109.13398"
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
        logits = self.model(x if replayed is None else torch.cat([x, replayed[0]]))  # (B + M, C): one forward
        bound = default_bound(logits) if self.bound is None else self.bound
        loss = -self.mean(F.cross_entropy(logits[: len(x)], y, reduction="none").clamp(max=bound))
        return loss if replayed is None else loss + F.cross_entropy(logits[len(x) :], replayed[1])
