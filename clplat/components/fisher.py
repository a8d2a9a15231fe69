"""Sizes of the gradients of single samples, or of groups of them; squared: the diagonal of the empirical Fisher
information."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._pytree import tree_leaves, tree_map

from clplat.stream import Data

VALUES_AT_ONCE = 2**25  # gradient values held at a time


class Samples:
    """Inputs (n, ...) of data, prepared a few at a time, so that those of a large experience need not be in memory.

    Args:
        data: whose inputs they are.
        prepare: of the strategy.
    """

    def __init__(self, data: Data, prepare: Callable[[Tensor], Tensor]) -> None:
        self.data, self.prepare = data, prepare

    def __len__(self) -> int:
        return len(self.data)

    def split(self, size: int) -> Iterator[Tensor]:
        """Prepared inputs (size, ...), in order; fewer at the end."""
        parts = torch.arange(len(self), device=self.data.inputs.device).split(size)
        coming = self.data.ahead(parts)
        return (self.prepare(coming.batch(part)[0]) for part in parts)


def mean_squared_gradient(
    loss: Callable[[Any, Tensor, Tensor], Tensor], values: Any, inputs: Tensor | Samples, labels: Tensor,
    group: int = 1, measure: Callable[[Tensor], Tensor] = torch.square,
) -> Any:  # fmt: skip
    """Mean over groups of `group` consecutive samples, of which the last may be smaller, of (∂ loss / ∂ values)².

    Args:
        loss: of values, inputs (b, ...) and labels of a group; a scalar.
        values: tensors without gradient, nested as `loss` takes them; what is returned is nested alike.
        inputs: (n, ...), prepared, n ≥ 1.
        labels: (n, ...).
        measure: what is taken of each gradient instead of its square (`torch.abs`).
    """
    total = tree_map(torch.zeros_like, values)
    chunk = max(1, VALUES_AT_ONCE // sum(v.numel() for v in tree_leaves(values))) * group
    for x, y in zip(inputs.split(chunk), labels.split(chunk), strict=True):
        even = len(x) - len(x) % group
        for part in (slice(0, even), slice(even, len(x))):
            if size := min(group, len(x[part])):
                groups = x[part].unflatten(0, (-1, size)), y[part].unflatten(0, (-1, size))
                total = tree_map(torch.add, total, _sizes(measure, loss, values, *groups))
    return tree_map(lambda t: t / -(-len(inputs) // group), total)


def _sizes(
    measure: Callable[[Tensor], Tensor], loss: Callable[[Any, Tensor, Tensor], Tensor], values: Any, inputs: Tensor,
    labels: Tensor,
) -> Any:  # fmt: skip
    """Sum over groups of the size of the gradient; inputs (groups, b, ...), labels (groups, b, ...)."""
    with sdpa_kernel(SDPBackend.MATH):  # vmap has no rule for the fused kernel, and warns
        try:
            found = vmap(grad(loss), in_dims=(None, 0, 0))(values, inputs, labels)
        except RuntimeError as error:
            if "data-dependent control flow" not in str(error):
                raise
        else:
            return tree_map(lambda g: measure(g).sum(0), found)
        # A model that looks at its numbers (the masks of some in transformers) is run for one group after the other.
        total = tree_map(torch.zeros_like, values)
        for x, y in zip(inputs, labels, strict=True):
            total = tree_map(lambda t, g: t + measure(g), total, grad(loss)(values, x, y))
        return total
