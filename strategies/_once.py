"""A pass over the data of an experience beside training: each sample once, not augmented, shared out to processes
where they can."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clplat import Data, Strategy
from clplat.components.shards import is_sharded
from clplat.strategy import evaluating


@torch.no_grad()
def once(strategy: Strategy, data: Data, chunk: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Prepared inputs (b, ...), b ≤ `chunk`, and labels (b,) of this process's share of `data`, in evaluation mode."""
    with evaluating(strategy):
        parts = torch.arange(len(data), device=data.inputs.device).split(chunk)
        if shared(strategy):
            parts = parts[strategy.rank :: strategy.world_size]
        coming, targets = data.ahead(parts), data.targets()
        for positions in parts:
            yield strategy.prepare(coming.batch(positions)[0]), targets[positions]


def shared(strategy: Strategy) -> bool:
    """Whether each process takes samples of its own; a pass of sharded weights is of all, so each takes all."""
    return not any(is_sharded(p) for p in strategy.parameters())
