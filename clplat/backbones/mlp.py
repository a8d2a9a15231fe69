"""Multilayer perceptron."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from torch import Tensor, nn

from clplat.backbones.base import Backbone, Role, require


class MLP(Backbone):
    """Flatten, then Linear and ReLU for each width; PyTorch's default initialisation."""

    def __init__(self, in_features: int, hidden: Sequence[int]) -> None:
        super().__init__()
        widths = [in_features, *hidden]
        self.net = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in itertools.pairwise(widths)))
        self.embed_dim = widths[-1]

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.net)

    def role(self, name: str) -> Role | None:
        return "ffn"

    def features(self, inputs: Tensor) -> Tensor:
        return self.net(inputs.flatten(1))


def mlp(input_shape: tuple[int, ...], hidden: list[int] = [400, 400]) -> Backbone:  # noqa: B006
    """Multilayer perceptron with ReLU after every layer.

    Args:
        input_shape: of one sample; any shape, flattened.
        hidden: width of each layer, > 0; the last is D. Empty: the flattened inputs are the features.
    """
    require("input_shape", input_shape, math.prod(input_shape) > 0, "of positive dimensions")
    require("hidden", hidden, all(width > 0 for width in hidden), "widths > 0")
    return MLP(math.prod(input_shape), hidden)
