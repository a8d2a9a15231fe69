"""How far the hidden states of two passes are apart, as `Backbone.recorded` gives them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clplat.backbones.base import States
from clplat.components.precision import wide

Consistency = Literal["mse", "one_sided"]


def distance(fast: States, slow: States, form: Consistency) -> list[Tensor]:
    """Squared differences of states, as sums over layers of means over a layer's states: (n,) for each size n of batch.

    All layers of a model read the b samples of its batch, but for CLIP's, whose towers read images and prompts: each
    tower is a list entry over its own batch. one_sided: only where the slow state is the larger. Positions of padding
    do not count. Divided by one layer more than there are blocks: what enters the first one is the same on both sides.
    """
    towers: dict[int, list[Tensor]] = {}
    for layer, (p, s) in enumerate(zip(fast.outputs, slow.outputs, strict=True)):
        gap = wide(s) - p
        squares = (gap.relu() if form == "one_sided" else gap).square()
        real = None if fast.valid is None else fast.valid[layer]
        if real is None:
            mean = squares.flatten(1).mean(1)
        else:
            valid = real.to(squares.dtype)  # (n, P)
            mean = (squares.mean(2) * valid).sum(1) / valid.sum(1).clamp(min=1)
        towers.setdefault(len(mean), []).append(mean)
    return [torch.stack(means).sum(0) / (len(fast.outputs) + 1) for means in towers.values()]
