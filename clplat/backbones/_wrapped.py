"""Any network of the user's as a backbone: an `nn.Module`, without its last layer, that gives features."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from clplat.backbones.base import Backbone
from clplat.errors import UserError


class Wrapped(Backbone):
    """A module that maps inputs (B, ...) to features (B, D).

    Its blocks are its children, in the order in which they were registered; D is found by a forward pass of two zero
    inputs. What its linear layers do is not known, so it has none that adapters could go to.

    Args:
        net: the module.
        input_shape: of one sample.

    Raises:
        UserError: it can't be run on such inputs, or gives anything but (B, D).
    """

    def __init__(self, net: nn.Module, input_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.net = net
        self.embed_dim = _width(net, input_shape)

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.net.children()) or [self.net]

    def features(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


def wrapped(net: nn.Module, input_shape: tuple[int, ...]) -> Backbone:
    """`net` as a backbone; itself, where it is one."""
    return net if isinstance(net, Backbone) else Wrapped(net, input_shape)


def _width(net: nn.Module, input_shape: tuple[int, ...]) -> int:
    name, modes = type(net).__name__, [m for m in net.modules() if m.training]
    net.eval()
    try:
        with torch.no_grad():
            found = net(torch.zeros(2, *input_shape))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        why = " ".join(str(error).split())[:200]
        raise UserError(f"backbone: {name} can't be run on inputs (2, {_sides(input_shape)}): {why}") from error
    finally:
        for module in modes:
            module.training = True
    shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
    if not isinstance(found, Tensor) or found.ndim != 2 or len(found) != 2:
        raise UserError(f"backbone: {name} gives {shape} for two inputs (valid: features (2, D); pool or flatten them)")
    if not found.is_floating_point():
        raise UserError(f"backbone: {name} gives {found.dtype} (valid: floats)")
    return found.shape[1]


def _sides(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
