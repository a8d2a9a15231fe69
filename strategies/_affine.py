"""What strategies share that adapt the gains and offsets of normalisation layers only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from clplat import Experience, PerParameter, Strategy
from clplat.components.norms import norm_affine
from clplat.components.per_parameter import trainable
from clplat.errors import UserError
from clplat.strategies._stepping import Stepping


def refuse_without_norms(strategy: Strategy) -> None:
    """UserError where there is nothing for `strategy` to adapt."""
    if not norm_affine(strategy.model):
        raise UserError(f"strategy: {type(strategy).__name__} adapts normalisation layers, which this backbone has not")


class NormStepping(Stepping):
    """Base that keeps the values they have in the source model."""

    source: PerParameter

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        refuse_without_norms(self)
        self.source = PerParameter(nn.Module())

    def _chosen(self) -> Iterable[nn.Parameter]:
        return norm_affine(self.model)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        if self.adapting:
            self.source.grow(self.model)

    def _pairs(self) -> list[tuple[nn.Parameter, Tensor]]:
        """What adapts, and its value in the source model."""
        mine = trainable(self.model)
        return list(zip(mine.values(), self.source.of(mine), strict=True))

    @torch.no_grad()
    def _take_source(self) -> None:
        for mine, source in self._pairs():
            source.copy_(mine)

    @torch.no_grad()
    def _restore_source(self) -> None:
        for mine, source in self._pairs():
            mine.copy_(source)
