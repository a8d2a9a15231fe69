"""A slow average of the weights that adapters change, to predict with while training goes on with the fast ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from clplat.adapters.lora import LoRA
from clplat.components.precision import wide
from clplat.components.shards import is_sharded, parted
from clplat.strategy import require


class WeightAverage(nn.Module):
    """W̄ ← d W̄ + (1 − d) (W + Σ s B A) of every adapted layer, over the adapters in use.

    It averages whole weights, as they would be merged: the average of products, not the product of averages; in single
    precision at least, since steps of 1 − d round away in bfloat16. Held as parameters without gradient, not as
    buffers, which DDP by default sends to all processes in every forward pass; `grow` makes room for them, so it
    belongs in a strategy's `grow`.

    Args:
        lora: whose layers are averaged. All its changes are in the averages, so none is in use beside them.
        decay: d, weight of the old average, in [0, 1].
    """

    def __init__(self, lora: LoRA, decay: float) -> None:
        super().__init__()
        require("average_decay", decay, 0 <= decay <= 1, "in [0, 1]")
        self._lora = (lora,)  # in a tuple, so that it is no submodule of this one
        self.decay, self.count = decay, 0
        self.weights = nn.ParameterList()

    def grow(self) -> None:
        """Make room, once."""
        if not len(self.weights):
            for layer in self._lora[0].base_layers().values():
                self.weights.append(nn.Parameter(wide(torch.zeros_like(layer.weight)), requires_grad=False))

    def clear(self) -> None:
        """Start anew: the next update is the average."""
        self.count = 0

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are now, with the changes in use."""
        lora = self._lora[0]
        now = {name: wide(layer.weight) for name, layer in lora.base_layers().items()}
        for adapter in lora.active:
            now = {name: now[name] + parted(change, now[name]) for name, change in lora.delta(adapter).items()}
        for slow, weight in zip(self.weights, now.values(), strict=True):
            slow.lerp_(weight, 1 - self.decay if self.count else 1.0)
        self.count += 1

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Predict with the average: it stands in for the layers' weights, and no adapter is in use; then go back."""
        lora = self._lora[0]
        layers = list(lora.base_layers().values())
        # What passes bring together of sharded weights is the part itself, wherever `data` points.
        fast = [p.detach().clone() if is_sharded(p := layer.weight) else p.data for layer in layers]
        with lora.using():
            for slow, layer in zip(self.weights, layers, strict=True):
                _put(layer.weight, slow.data.to(layer.weight.dtype))
            try:
                yield
            finally:
                for weight, layer in zip(fast, layers, strict=True):
                    _put(layer.weight, weight)

    def get_extra_state(self) -> int:
        return self.count

    def set_extra_state(self, state: int | Tensor) -> None:
        self.count = int(state)


def _put(parameter: Tensor, values: Tensor) -> None:
    if is_sharded(parameter):
        parameter.detach().copy_(values)
    else:
        parameter.data = values
