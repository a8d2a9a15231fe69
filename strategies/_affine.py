"""What strategies share that adapt the gains and offsets of normalisation layers only."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from clplat import Experience, PerParameter, Strategy
from clplat.components.norms import norm_affine
from clplat.components.per_parameter import trainable
from clplat.errors import UserError
from clplat.strategies._stepping import Stepping


def last(blocks: Sequence[nn.Module], share: float) -> list[nn.Module]:
    """The last `share` of the blocks, rounded up."""
    return list(blocks[len(blocks) - math.ceil(share * len(blocks)) :])


def last_stage(backbone: nn.Module, blocks: Sequence[nn.Module]) -> list[nn.Module]:
    """The blocks that stand in one module with the last one; the last quarter where all of them do."""
    inside = next((set(m.children()) for m in backbone.modules() if blocks and blocks[-1] in set(m.children())), set())
    stage = [b for b in blocks if b in inside]
    return stage if len(stage) < len(blocks) else last(blocks, 0.25)


def norm_affine_below(model: nn.Module, top: float | None) -> list[nn.Parameter]:
    """Gains and offsets of what comes before the top blocks: the last `top` of them, or null, the last stage."""
    backbone: Any = getattr(model, "backbone", model)
    blocks = getattr(backbone, "blocks", [])
    left_alone = last_stage(backbone, blocks) if top is None else last(blocks, top)
    below: list[nn.Parameter] = []
    for module in backbone.modules():
        if left_alone and module is left_alone[0]:
            break
        below += list(module.parameters(recurse=False))
    wanted = {id(p) for p in below}
    return [p for p in norm_affine(backbone) if id(p) in wanted]


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
