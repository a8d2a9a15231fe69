"""Gradients of a second loss beside the one that is trained on, as one vector, and putting a vector in their place.

Shapes: P numbers of all the parameters together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clplat.components.precision import wide


def second_gradient(loss: Tensor, parameters: Sequence[nn.Parameter], world_size: int) -> Tensor:
    """∂ loss / ∂ parameters (P,), averaged over processes as DDP averages those of the loss that is trained on.

    A collective call where there are several. Leaves `.grad` alone, and is 0 where the loss does not depend.

    Args:
        loss: a scalar, of this process's part, weighed so that the mean over processes is meant (`Strategy.mean`).
    """
    found = torch.autograd.grad(loss, parameters, allow_unused=True)
    flat = torch.cat(
        [wide(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, found, strict=True)]
    )
    if world_size > 1:
        torch.distributed.all_reduce(flat)
        flat /= world_size
    return flat


def as_vector(parameters: Sequence[nn.Parameter]) -> Tensor:
    """`.grad` of all parameters as one vector (P,); 0 where there is none."""
    return torch.cat([wide(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def overwrite(parameters: Sequence[nn.Parameter], vector: Tensor) -> None:
    """Make `vector` (P,) the gradient of the parameters."""
    for p, part in zip(parameters, vector.split([p.numel() for p in parameters]), strict=True):
        p.grad = part.view_as(p).to(p.dtype)
