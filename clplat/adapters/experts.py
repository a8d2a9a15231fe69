"""Linear layers with experts of low rank beside them, all of which answer, each as much as a router says.

g(x) = softmax(W_g x),   y = W x + s Σ_n g_n(x) B_n A_n dropout_n(x),   s = alpha / r

Shapes: M rows of a batch, d inputs, o outputs, N experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones.base import Backbone
from clplat.components.precision import wide
from clplat.components.sums import over_processes


class ExpertLinear(nn.Linear):
    """A frozen linear layer with experts: A (N r, d) random and B (o, N r) zero, so that it is the layer at first.

    Args:
        base: the layer whose parameters it takes.
        experts: N ≥ 1.
        rank: r ≥ 1, of each.
        alpha: s = alpha / r.
        dropout: share of the inputs that is dropped on the way to each expert in training, in [0, 1).
    """

    def __init__(self, base: nn.Linear, experts: int, rank: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.experts, self.scale, self.dropout = experts, alpha / rank, dropout
        like = wide(base.weight.new_zeros(0))
        self.router = nn.Parameter(like.new_empty(experts, self.in_features))
        self.down = nn.Parameter(like.new_empty(experts * rank, self.in_features))
        self.up = nn.Parameter(like.new_zeros(self.out_features, experts * rank))
        for weight in (self.router, self.down):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        self.real: Callable[[], Tensor | None] = lambda: None  # (M, T) bool: positions of this pass that hold tokens
        self._load: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input, self.weight, self.bias)  # (M, ..., o)
        with torch.autocast(input.device.type, enabled=False):
            x = input.to(self.down.dtype)
            gates = F.linear(x, self.router).softmax(-1)  # (M, ..., N)
            if self.training and self.dropout:  # of each expert by itself
                parts = [F.linear(F.dropout(x, self.dropout), a) for a in self.down.chunk(self.experts)]
                inner = torch.stack(parts, -2)
            else:
                inner = F.linear(x, self.down).unflatten(-1, (self.experts, -1))  # (M, ..., N, r)
            change = self.scale * F.linear((gates.unsqueeze(-1) * inner).flatten(-2), self.up)
        if self.training:
            if (real := self.real()) is not None:
                gates = gates * real.unsqueeze(-1)
            self._load = gates.flatten(1, -2).sum(1).T if gates.ndim > 2 else gates.T
        return out + change.to(out.dtype)

    def take_load(self) -> Tensor | None:
        """Q (N, M) = Σ over a row's tokens of g_n, of the last pass in training, once; None where there was none."""
        load, self._load = self._load, None
        return load


def pass_over_padding(backbone: Backbone) -> None:
    """Let the loads of the experts in a backbone's blocks count tokens alone."""
    for number, block in enumerate(backbone.blocks):
        for layer in (m for m in block.modules() if isinstance(m, ExpertLinear)):
            layer.real = partial(_positions, backbone, number)


def _positions(backbone: Backbone, block: int) -> Tensor | None:
    """(M, T) bool: which positions in a block hold tokens; None where none is padding."""
    found = backbone.positions()
    return None if found is None else found[block]


def imbalance(z: Tensor, alike: bool = False) -> Tensor:
    """Unbiased variance of all entries of Z (N, M) over their squared mean: over the batch of all processes.

    Args:
        alike: whether every process has the same rows, which count once.
    """
    z = z.double()
    sums = torch.stack([z.sum(), z.square().sum(), z.new_tensor(float(z.numel()))])
    total, squares, count = sums if alike else over_processes(sums)
    mean = total / count
    return (squares - total * mean) / (count - 1) / (mean.square() + 1e-10)
