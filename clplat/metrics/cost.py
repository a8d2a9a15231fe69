"""What a run costs: memory, parameters, stored bytes, floating-point operations."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

if TYPE_CHECKING:
    from clplat.strategy import Strategy


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since it started."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def peak_device_bytes(device: torch.device) -> int | None:
    """Largest memory allocated on `device` by this process; None where the device is the CPU or keeps no count."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def trainable_parameters(module: nn.Module) -> int:
    """Numbers of `module` that receive gradients; a shared parameter counts once.

    >>> trainable_parameters(nn.Linear(3, 2))
    8
    """
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


def stored_bytes(strategy: Strategy) -> int:
    """Bytes that a strategy keeps between experiences beyond its model: memories, copies, statistics, extra state.

    All of `strategy.state_dict()`, less what `strategy.model` holds. A tensor that stands there twice counts once, a
    plain number 8 bytes, text its length in UTF-8.
    """
    seen = {_identity(t) for t in strategy.model.state_dict(keep_vars=True).values() if isinstance(t, Tensor)}
    own = {k: v for k, v in strategy.state_dict(keep_vars=True).items() if not k.startswith("model.")}
    own = {k: v for k, v in own.items() if ".filed." not in k}  # which says where rows are
    total = sum(getattr(module, "bytes_on_disk", 0) for module in strategy.modules())
    for leaf in _leaves(own):
        if not isinstance(leaf, Tensor):
            total += len(leaf.encode()) if isinstance(leaf, str) else 8
        elif leaf.numel() and _identity(leaf) not in seen:
            seen.add(_identity(leaf))
            total += leaf.numel() * leaf.element_size()
    return total


def step_flops(step: Callable[[], Any]) -> int:
    """Floating-point operations of one call of `step`, its backward pass included if `step` runs it.

    Counts 2 for each multiply-add of matrix products, convolutions and attention, as torch.utils.flop_counter does;
    element-wise operations count nothing. `step` is called once, and slowly: use a step that is run anyhow.

    >>> step_flops(lambda: torch.zeros(2, 3) @ torch.zeros(3, 4))
    48
    """
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return int(counter.get_total_flops())


def _identity(tensor: Tensor) -> tuple[int, torch.Size]:
    part: Any = getattr(tensor, "_local_tensor", tensor)  # of a sharded one, which has no memory of its own
    return part.data_ptr(), tensor.shape


def _leaves(value: Any) -> Iterator[Any]:
    """Tensors, numbers and text in nested dicts and sequences; None holds nothing."""
    if isinstance(value, dict):
        for item in value.values():
            yield from _leaves(item)
    elif isinstance(value, list | tuple | set):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, Tensor | int | float | complex | str):
        yield value
