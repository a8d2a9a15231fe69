"""A processor that rounds otherwise: `-p rounding` puts results of kernels off by up to one unit in the last place.

Which way depends on the kernel and on the shapes that it is given, as with real libraries, which choose kernels by
shape; equal calls give equal results. The place of a row in its batch has no say, and exact results (sums of short
binary fractions) stay exact.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

OFF = {
    f"aten::{name}" for name in (
        "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "convolution", "convolution_backward", "sum", "mean",
        "var", "linalg_vector_norm", "exp", "log", "tanh", "_softmax", "_log_softmax", "native_layer_norm",
        "native_batch_norm",
    )
}  # fmt: skip


class Rounding(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func._schema.name not in OFF or "out" in func._overloadname:
            return out
        shapes = (str(func), *(tuple(a.shape) for a in args if isinstance(a, Tensor)))
        return type(out)(_off(t, shapes) for t in out) if isinstance(out, tuple) else _off(out, shapes)


def _off(value: Any, shapes: tuple[Any, ...]) -> Any:
    if not isinstance(value, Tensor) or value.dtype not in (torch.float32, torch.float64):
        return value
    grid = 2.0 ** (10 if value.dtype == torch.float32 else 34)  # losses by hand; ACIL's sums, on a grid of 2^-28
    if torch.equal(value * grid, (value * grid).round()):
        return value
    return torch.where(value.isfinite(), value + value * _units(shapes, value.shape, value.dtype), value)


@cache
def _units(shapes: tuple[Any, ...], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """-1, 0 or 1 unit in the last place for each value of a row."""
    draw = torch.Generator().manual_seed(zlib.crc32(str((shapes, tuple(shape))).encode()))
    row = (1, *shape[1:]) if shape else ()
    return torch.randint(-1, 2, row, generator=draw).to(dtype) * torch.finfo(dtype).eps


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    with Rounding():
        return (yield)
