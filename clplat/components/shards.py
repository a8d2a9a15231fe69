"""Tensors of which each process holds a part: what of one is here, and the whole of it."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_sharded(tensor: Any) -> bool:
    """Whether this process holds a part of it only."""
    return hasattr(tensor, "full_tensor")


def whole(state: Any, keep: bool) -> Any:
    """Nested dicts and lists with sharded tensors brought together, on the CPU; a collective call.

    Args:
        keep: whether this process keeps them; others get tensors without numbers.
    """
    seen: dict[int, Tensor] = {}  # tied weights are one tensor, and stay one

    def brought(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: brought(v) for k, v in value.items()}
        if isinstance(value, list | tuple):
            return [brought(v) for v in value]
        if not is_sharded(value):
            return value
        if id(value) not in seen:
            found = value.detach().full_tensor()
            seen[id(value)] = found.cpu() if keep else found.new_empty(0)
        return seen[id(value)]

    return brought(state)


def parted(value: Any, like: Any) -> Any:
    """This process's part of the whole tensor `value`, where `like` is sharded and of its shape; else `value`."""
    if not is_sharded(like) or is_sharded(value) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
