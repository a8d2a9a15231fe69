"""A pool of low-rank changes of a backbone's layers, of which each sample takes one.

Source   Schmied et al., "Learning to Modulate pre-trained Models in RL", NeurIPS 2023, arXiv:2306.14884.
    query, value   y = W x + s B_p A_p x
    first layer of the MLP   u = W x;   y = u + s B_p A_p u
    A (r, ·) ~ U(±1/√width), B (·, r) = 0: a pool begins as no change
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.adapters.replace import replaced
from clplat.backbones.base import Backbone
from clplat.components.precision import wide
from clplat.errors import UserError


class PooledLinear(nn.Linear):
    """A frozen linear layer of d inputs and o outputs, with P pairs of factors.

    Args:
        base: the layer whose parameters it takes.
        size: P ≥ 1.
        rank: r ≥ 1.
        scale: s.
        behind: the change is one of the layer's outputs, not of its inputs.
    """

    def __init__(self, base: nn.Linear, size: int, rank: int, scale: float, behind: bool) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias, self.scale, self.behind = base.weight, base.bias, scale, behind
        self.slots: Tensor | None = None  # (B,) of the samples of this pass; None: no change
        width, like = self.out_features if behind else self.in_features, wide(base.weight.new_zeros(0))
        bound = 1 / math.sqrt(width)
        self.a = nn.Parameter(like.new_empty(size, rank, width).uniform_(-bound, bound))
        self.b = nn.Parameter(like.new_zeros(size, self.out_features, rank))

    def forward(self, input: Tensor) -> Tensor:
        out = F.linear(input, self.weight, self.bias)  # (B, ..., o)
        if self.slots is None:
            return out
        if len(input) != len(self.slots):
            what = f"a layer sees {len(input)} rows for {len(self.slots)} samples"
            raise UserError(f"backbone: {what}: a pool changes sequences of one sample each, and no windows of it")
        seen = (out if self.behind else input).to(self.a.dtype).flatten(1, -2)  # (B, T, ·)
        change = torch.bmm(torch.bmm(seen, self.a[self.slots].mT), self.b[self.slots].mT)
        return out + (self.scale * change).to(out.dtype).view_as(out)


class Pool:
    """Changes a backbone in every forward pass from now on, each sample by the slot that it is given.

    Args:
        backbone: whose projections to queries and values (a fused one as a whole) and widening layers of MLPs change.
        size: P ≥ 1, slots.
        rank: r ≥ 1.
        scale: s.
        choose: inputs (B, ...) → slots (B,) int64; may run the backbone, which is without the pool meanwhile.

    Raises:
        UserError: the backbone has no such layers, or one that is not plain. In a pass: it sees a sample's parts apart.
    """

    def __init__(
        self, backbone: Backbone, size: int, rank: int, scale: float, choose: Callable[[Tensor], Tensor]
    ) -> None:
        wanted = ("query", "value", "qkv")
        changed = {n: m for n, m in backbone.layers("attention").items() if backbone.projection(n) in wanted}
        widening = {n: m for n, m in backbone.layers("ffn").items() if m.out_features > m.in_features}
        if not changed:
            raise UserError(f"backbone: has no projections to queries and values to change{backbone.offered()}")
        kept = {id(m) for m in (*changed.values(), *widening.values())}
        roles = [role for role, found in (("attention", changed), ("ffn", widening)) if found]
        behind = {id(m) for m in widening.values()}

        def make(layer: nn.Linear) -> PooledLinear | None:
            return PooledLinear(layer, size, rank, scale, id(layer) in behind) if id(layer) in kept else None

        self.layers = list(replaced(backbone, roles, make).values())  # type: ignore[arg-type]
        self._resting, forward = False, backbone.forward

        def modulated(inputs: Tensor) -> Tensor:
            if self._resting:
                return forward(inputs)
            with self.resting():
                slots = choose(inputs)
            with self._using(slots):
                return forward(inputs)

        backbone.forward = modulated  # type: ignore[method-assign]

    @contextmanager
    def resting(self) -> Iterator[None]:
        """The backbone as it is without the pool."""
        before, self._resting = self._resting, True
        try:
            with self._using(None):
                yield
        finally:
            self._resting = before

    @contextmanager
    def _using(self, slots: Tensor | None) -> Iterator[None]:
        before = [layer.slots for layer in self.layers]
        try:
            for layer in self.layers:
                layer.slots = slots
            yield
        finally:
            for layer, old in zip(self.layers, before, strict=True):
                layer.slots = old
