"""One tensor for each trainable parameter of a model: importances, anchors, path integrals."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


class PerParameter(nn.Module):
    """A tensor shaped like each trainable parameter of `model`, zero at first.

    One that is frozen later keeps its tensor; one that is thawed gets zeros when this is grown.

    Held as parameters without gradient, not as buffers, which DDP by default sends to all processes in every forward
    pass.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.values = nn.ParameterDict()
        self.grow(model)

    @torch.no_grad()
    def grow(self, model: nn.Module) -> None:
        """Follow the model's growth: new parameters, and new rows of old ones, get zeros."""
        for name, parameter in trainable(model).items():
            old = self.values.get(attribute(name))
            if old is not None and old.shape == parameter.shape:
                continue
            new = torch.zeros_like(parameter)
            if old is not None:
                new[tuple(slice(n) for n in old.shape)] = old
            self.values[attribute(name)] = nn.Parameter(new, requires_grad=False)

    def of(self, names: Iterable[str]) -> list[Tensor]:
        """The tensors of these parameters, in this order.

        Raises:
            KeyError: one was frozen whenever this was made or grown, and so has none.
        """
        names = list(names)
        if absent := [name for name in names if attribute(name) not in self.values]:
            raise KeyError(f"no tensor for {', '.join(absent)}: frozen when this was made or grown (see `trainable`)")
        return [self.values[attribute(name)] for name in names]


def attribute(name: str) -> str:
    """A parameter's name as that of a module's attribute, which may not hold a dot."""
    return name.replace(".", "/")
