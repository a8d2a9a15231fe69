"""How far the hidden states of two passes are apart, as `Backbone.recorded` gives them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clplat.backbones.base import States
from clplat.components.precision import wide

Consistency = Literal["mse", "one_sided"]


def distance(fast: States, slow: States, form: Consistency) -> Tensor:
    """Mean over states and layers of the squared difference, for each of b samples: (b,).

    one_sided: only where the slow state is the larger. Positions of padding do not count. The mean is over one layer
    more than there are blocks: what enters the first one is the same on both sides.
    """
    means = []
    for layer, (p, s) in enumerate(zip(fast.outputs, slow.outputs, strict=True)):
        gap = wide(s) - p
        squares = (gap.relu() if form == "one_sided" else gap).square()
        if fast.valid is None:
            means.append(squares.flatten(1).mean(1))
        else:
            valid = fast.valid[layer].to(squares.dtype)  # (b, P)
            means.append((squares.mean(2) * valid).sum(1) / valid.sum(1).clamp(min=1))
    return torch.stack(means).sum(0) / (len(means) + 1)
