"""A small strategy that learns and adapts, and a stream whose labels can be permuted; used to test the adapt loop."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat import Kind, Strategy
from clplat.streams.corruptions import Corruptions


class Adapting(Strategy):
    """Entropy minimisation of all weights, the simplest thing that adapts."""

    kinds = frozenset({Kind.LEARN, Kind.ADAPT})
    paper = "none: a test"

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def adapt_step(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.model(inputs)
        return logits.detach(), self.mean(-(logits.softmax(1) * logits.log_softmax(1)).sum(1))


class Permuted(Corruptions):
    """Corruptions whose adapt data have their labels permuted.

    Args:
        by: seed of the permutation; null leaves the labels.
    """

    def __init__(self, *, by: int | None = None, seed: int | None = None, data_root: str | None = None,
                 order: str = "continual", rounds: int = 1) -> None:  # fmt: skip
        super().__init__(seed=seed, data_root=data_root, corruptions=["fog", "shot_noise", "glass_blur"],
                         order=order, rounds=rounds, samples=90, clean=100)  # type: ignore[arg-type]  # fmt: skip
        if by is None:
            return
        generator = torch.Generator().manual_seed(by)

        def permuted(e: Any) -> Any:
            if e.kind is not Kind.ADAPT:
                return e
            labels = e.train.labels
            mixed = labels[torch.randperm(len(labels), generator=generator)]
            return dataclasses.replace(e, train=dataclasses.replace(e.train, labels=mixed))

        self.experiences = tuple(permuted(e) for e in self.experiences)
