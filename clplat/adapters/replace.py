"""Other layers in the places of a backbone's linear ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import nn

from clplat.backbones.base import Backbone, Role
from clplat.errors import UserError
from clplat.strategy import require

T = TypeVar("T", bound=nn.Module)


def replaced(backbone: Backbone, roles: Sequence[Role], make: Callable[[nn.Linear], T | None]) -> dict[str, T]:
    """Put `make(layer)` in the place of each linear layer of these roles: what was put there, by the layers' names.

    Args:
        make: None leaves a layer as it is.

    Raises:
        UserError: the backbone has no such layers, or one that is not plain.
    """
    named = {name: layer for role in roles for name, layer in backbone.layers(role).items()}
    require("roles", roles, bool(named), f"roles of which the backbone has layers{backbone.offered()}")
    found: dict[str, T] = {}
    for name, layer in named.items():
        if type(layer) is not nn.Linear:  # some are read by the module above them, past their own forward pass
            raise UserError(f"strategy.roles: {name} is a {type(layer).__name__}; only plain linear layers serve")
        new = make(layer)
        if new is not None:
            path, _, leaf = name.rpartition(".")
            setattr(backbone.get_submodule(path), leaf, new)
            found[name] = new
    return found
