"""Gradients of a second loss beside the one that is trained on, as one vector, and putting a vector in their place; of
a loss over the rows of all processes.

Shapes: P numbers of all the parameters together.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from clplat.components.memory import gathered
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


def of_all(rows: Tensor, world_size: int) -> Tensor:
    """Rows (b, ...) of all processes, one process after the other, for a loss that is no mean over samples.

    A collective call where there are several. This process's own carry gradients, as many times as there are
    processes, since DDP takes the mean over these.
    """
    if world_size == 1:
        return rows
    rank, plain = torch.distributed.get_rank(), rows.detach()
    found = gathered({"labels": torch.full((len(rows),), rank, device=rows.device), "rows": plain})
    own = (found["labels"] == rank).nonzero()[:, 0]
    return found["rows"].index_copy(0, own, plain + world_size * (rows - plain))
