"""Features that are the same each time a sample is seen, whatever else is in its batch.

Matrix products and convolutions choose their kernels by the size of a batch, and kernels differ in their last bits
(measured: all rows of an MLP differ between batches of 1 and of 64). They also treat the last rows apart where a batch
is no multiple of their own (measured: 13, 20 or 50 rows with SSE kernels, 7 with AVX-512 and two threads; none of 16).
What is subtracted later must be what was added, so a frozen network is always run on batches of one size, a multiple of
16, the last one filled up with zeros.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clplat.strategy import evaluating

MULTIPLE = 16


def in_chunks(function: Callable[[Tensor], Tensor], inputs: Tensor, rows: int) -> Tensor:
    """`function` of inputs (n, ...), always of `rows` rows, or the next multiple of 16, at a time: (n, ...)."""
    made, rows = [], -(-rows // MULTIPLE) * MULTIPLE
    for part in inputs.split(rows):
        padding = part.new_zeros(rows - len(part), *part.shape[1:])
        made.append(function(torch.cat([part, padding]))[: len(part)])
    return torch.cat(made)


@torch.no_grad()
def frozen_features(model: nn.Module, inputs: Tensor, rows: int) -> Tensor:
    """Features (n, D) of prepared inputs (n, ...): evaluation mode, 32-bit precision, `rows` samples at a time."""
    features: Callable[[Tensor], Tensor] = model.features  # type: ignore[assignment]
    with evaluating(model), torch.autocast(inputs.device.type, enabled=False):
        return in_chunks(features, inputs, rows)
