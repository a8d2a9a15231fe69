"""Which samples come when: a pure function of (seed, experience, epoch), so that two integers resume it exactly."""

from __future__ import annotations

import torch
from torch import Tensor


def epoch_order(size: int, seed: int, experience: int, epoch: int, device: torch.device) -> Tensor:
    """Shuffled positions (size,) int64 of one epoch, the same on every process and machine."""
    generator = torch.Generator().manual_seed(((seed * 1_000_003 + experience) * 1_000_003 + epoch) % 2**63)
    return torch.randperm(size, generator=generator).to(device)


def by_length(order: Tensor, lengths: Tensor, batch_size: int, window: int) -> Tensor:
    """`order` (n,) with batches of samples of similar length, so that little of a batch is padding.

    Each run of `window` batches is sorted by length and cut into batches again; of these, the one that holds the
    sample drawn first comes first. A last, short batch stays as it was drawn.

    Args:
        lengths: (n,) of the samples by position, not by place in `order`.
    """
    full = len(order) // batch_size * batch_size
    arranged = []
    for drawn in order[:full].split(batch_size * window):
        places = lengths[drawn].argsort(stable=True).view(-1, batch_size)  # (batches, batch_size)
        arranged.append(drawn[places[places.amin(1).argsort()]].flatten())
    return torch.cat([*arranged, order[full:]])


def batches_per_epoch(size: int, batch_size: int, world_size: int) -> int:
    """Batches of one epoch; the last one may be short."""
    return -(-size // (batch_size * world_size))


def local_slice(size: int, batch: int, batch_size: int, rank: int, world_size: int) -> tuple[slice, int]:
    """This process's part of global batch number `batch` of an order (size,), and that batch's size over all processes.

    Process r takes the r-th contiguous piece, pieces differing by at most one sample, so that the pieces in order are
    the batch that one process with the whole batch size would have drawn.
    """
    start = batch * batch_size * world_size
    whole = min(batch_size * world_size, size - start)
    each, more = divmod(whole, world_size)
    start += rank * each + min(rank, more)
    return slice(start, start + each + (rank < more)), whole


def rounds(size: int, start: int, count: int, seed: int, device: torch.device) -> Tensor:
    """Positions (count,) of the draws from number `start` on, when `size` samples come round, each time shuffled."""
    numbers = range(start // size, (start + count - 1) // size + 1)
    order = torch.cat([epoch_order(size, seed, 0, k, device) for k in numbers])
    return order[start - numbers[0] * size :][:count]


def some_of_each(labels: Tensor, shots: int, seed: int) -> Tensor:
    """Positions, sorted, of at most `shots` samples of each class, drawn at random. Labels (n,) of classes ≥ 0."""
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).to(labels.device)
    order = shuffled[labels[shuffled].sort(stable=True).indices]
    counts = torch.bincount(labels)
    rank = torch.arange(len(labels), device=labels.device) - (counts.cumsum(0) - counts)[labels[order]]
    return order[rank < shots].sort().values
