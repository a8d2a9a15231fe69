"""Sums over samples, which processes add to apart and bring together when they are read."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Sums(nn.Module):
    """Base of statistics that are sums over samples. A subclass gives them by `_sums`, and adds to them.

    From `open` to `gather` each process holds the sums of its own samples, process 0 besides those that were there.
    """

    apart: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("apart", torch.zeros((), dtype=torch.bool))  # each process holds sums of its own samples

    def grow(self, classes: int) -> None:
        """Room for classes 0 … `classes` − 1."""
        raise NotImplementedError

    def _sums(self) -> Iterator[Tensor]:
        """Everything that is a sum over samples, as views; of symmetric matrices the part that is kept up."""
        raise NotImplementedError

    def open(self, shared: bool = True) -> None:
        """Begin to add. Under DDP process 0 keeps the sums and the others start theirs from zero.

        Args:
            shared: each process adds samples of its own; else each adds all of them.
        """
        self.apart.fill_(shared and world_size() > 1)
        self.keep_on_one()

    def merge(self) -> None:
        """Bring the sums of all processes together on process 0, for a checkpoint: the others start again from zero."""
        if self.apart:
            self._reduce()
            self.keep_on_one()

    def gather(self) -> None:
        """Bring the sums together on every process, in one all-reduce."""
        if self.apart:
            self._reduce()
            self.apart.fill_(False)

    def absorb(self, other: Sums) -> None:
        """Add what another of the same shapes holds, which is empty then. Both are gathered."""
        for mine, theirs in zip(self._sums(), other._sums(), strict=True):
            mine += theirs
            theirs.zero_()

    def _reduce(self) -> None:
        """Add the sums of all processes up on each of them."""
        parts = list(self._sums())
        flat = torch.cat([part.reshape(-1).double() for part in parts])
        torch.distributed.all_reduce(flat)
        for part, values in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
            part.copy_(values.view_as(part))

    def keep_on_one(self) -> None:
        """Where the sums are apart, only process 0 keeps what there is."""
        if self.apart and rank() > 0:
            for part in self._sums():
                part.zero_()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.apart &= world_size() > 1
        self.keep_on_one()


def world_size() -> int:
    """Processes that run together."""
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def over_processes(own: Tensor) -> Tensor:
    """The sum over all processes of what each has, for a loss of all samples.

    Its gradient is that of the own part, as many times as there are processes: DDP takes the mean of gradients.
    """
    if (world := world_size()) == 1:
        return own
    whole = own.detach().clone()
    torch.distributed.all_reduce(whole)
    return whole + world * (own - own.detach())


def rank() -> int:
    """Number of this process, from 0."""
    return torch.distributed.get_rank() if world_size() > 1 else 0
