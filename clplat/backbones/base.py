"""What a backbone offers to every strategy, whatever its family, and the model made of a backbone and a head.

Shapes: B samples of a batch, D features, C classes.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Literal, get_args

from torch import Tensor, nn

from clplat.errors import UserError
from clplat.stream import Experience

Role = Literal["attention", "ffn"]


class Backbone(nn.Module, ABC):
    """Inputs to features. A subclass sets `embed_dim` and writes `features` and `blocks`."""

    embed_dim: int

    @abstractmethod
    def features(self, inputs: Tensor) -> Tensor:
        """Features (B, D) of prepared inputs (B, ...), D = `embed_dim`."""

    @property
    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """The repeated parts in the order they are run, each with one activation tensor as its output."""

    def role(self, name: str) -> Role | None:
        """What the linear layer at dotted `name` does, or None where it is not meant to be adapted."""
        return None

    def layers(self, role: Role) -> dict[str, nn.Linear]:
        """Adaptable linear layers of one role, keyed by their dotted names within the backbone, in order.

        Empty where the family has no such role. A layer that carries an adapter is under the name it had before, and
        the adapter's factors are none of them.

        Raises:
            UserError: `role` is neither "attention" nor "ffn".
        """
        require("role", role, role in get_args(Role), f"one of {', '.join(get_args(Role))}")
        named = ((n, m) for n, m in self.named_modules() if isinstance(m, nn.Linear) and ".lora_" not in n)
        plain = ((name.removesuffix(".base_layer"), layer) for name, layer in named)
        return {name: layer for name, layer in plain if self.role(name) == role}

    def forward(self, inputs: Tensor) -> Tensor:
        return self.features(inputs)


class Head(nn.Module, ABC):
    """Features to logits. Its rows may grow; growing in the same order gives the same structure.

    Args:
        in_features: D, > 0.
        num_classes: classes of the whole stream, > 0.
    """

    def __init__(self, in_features: int, num_classes: int) -> None:
        super().__init__()
        require("in_features", in_features, in_features > 0, "> 0", group="head")
        require("num_classes", num_classes, num_classes > 0, "> 0 (this stream has no classes)", group="head")
        self.in_features, self.num_classes = in_features, num_classes

    @abstractmethod
    def forward(self, features: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) for features (B, D); `task` only where the stream declares it known."""

    def predict(self, features: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) in evaluation, where a head decides otherwise than in training."""
        return self(features, task)

    def grow(self, experience: Experience) -> None:
        """Make room for the classes of `experience`; does nothing where they all have theirs. Uses no data."""
        bad = [c for c in experience.classes if not 0 <= c < self.num_classes]
        if bad:
            raise UserError(
                f"stream: class {bad[0]} of '{experience.name}' is out of range (valid: 0..{self.num_classes - 1})"
            )


class Classifier(nn.Module):
    """A backbone and a head.

    Args:
        backbone: gives features (B, D).
        head: gives logits (B, C) from them; its `in_features` is the backbone's `embed_dim`.
    """

    def __init__(self, backbone: Backbone, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) for prepared inputs (B, ...)."""
        return self.head(self.backbone(inputs), task)

    def features(self, inputs: Tensor) -> Tensor:
        """Features (B, D) for prepared inputs (B, ...)."""
        return self.backbone(inputs)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) in evaluation (see `Head.predict`)."""
        return self.head.predict(self.backbone(inputs), task)

    def grow(self, experience: Experience) -> None:
        """Make room in the head for the classes of `experience`."""
        self.head.grow(experience)


def require(key: str, value: object, holds: bool, valid: str, group: str = "backbone") -> None:
    """Refuse an option out of range, naming it, its value and the valid range."""
    if not holds:
        raise UserError(f"{group}.{key}: {value!r} is out of range (valid: {valid})")


def image_shape(input_shape: tuple[int, ...], name: str) -> tuple[int, int, int]:
    """(channels, height, width) of `input_shape`; UserError where it is no image."""
    if len(input_shape) != 3 or math.prod(input_shape) <= 0:
        shape = tuple(input_shape)
        raise UserError(f"backbone: {name} takes images (channels, height, width), but the stream's inputs are {shape}")
    channels, height, width = input_shape
    return channels, height, width
