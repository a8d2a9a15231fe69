"""What is done to raw inputs before a model takes them, as data: with it a checkpoint can be asked without its stream.

A stream says it (`Stream.preprocessing`), a checkpoint holds it as JSON, `clplat.data.raw` does it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from clplat.errors import UserError
from clplat.inputs import Inputs

Statistics = tuple[Sequence[float], Sequence[float]]  # mean and standard deviation of each channel of images in [0, 1]
Fit = Literal["none", "middle", "squeezed", "cropped"]


@dataclass(frozen=True)
class Preprocessing:
    """From raw inputs to those that a stream holds, and from these to what a model takes.

    Args:
        shape: of one sample as it is held: (D,) features, (C, H, W) pictures, (2, L) token ids, any other of numbers.
        ids: it holds token ids, which nothing changes.
        white: what integers are divided by, > 0; numbers that are no integers then lie in [0, 1]. None: all are taken
            as they are.
        layout: of pictures in arrays whose shape does not tell it: channels_first or channels_last.
        fit: how a picture of another size becomes one of this (see `clplat.data.pictures`); none: it does not.
        stretched: arrays of pictures of another size are scaled to this one, bilinear.
        normalize: (mean, deviation) of each channel, by which what is held, in [0, 1], is normalised; None: it is not.
        text: how texts become ids: tokenizer and fingerprint of it, chat, max_length. None: they can't.
        choices: of each task, the classes that its prompts name to choose from; empty: prompts name none.
        acting: of an agent: shape and keys of a raw observation, and for each experience low and high, the bounds of
            its actions.
        refused: what can't be taken, `all` or `pictures`, and why.
    """

    shape: tuple[int, ...] = ()
    ids: bool = False
    white: float | None = None
    layout: str | None = None
    fit: Fit = "none"
    stretched: bool = False
    normalize: Statistics | None = None
    text: Mapping[str, Any] | None = None
    choices: tuple[tuple[int, ...], ...] = ()
    acting: Mapping[str, Any] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Preprocessing:
        """Inverse of `to_dict`."""
        choices = tuple(tuple(classes) for classes in plain["choices"])
        return cls(**{**plain, "shape": tuple(plain["shape"]), "choices": choices})

    def prepare(self, held: Tensor) -> Tensor:
        """Inputs (B, ...) as they are held to what a model takes: bytes to [0, 1], normalised."""
        return normalized(held, tensors(self.normalize, len(self.shape)))


def tensors(statistics: Statistics | None, dimensions: int) -> tuple[Tensor, Tensor] | None:
    """Mean and deviation for samples of so many dimensions, the first of which are the channels."""
    if statistics is None:
        return None
    mean, std = (torch.tensor(v).view(-1, *[1] * (dimensions - 1)) for v in statistics)
    return mean, std


def normalized(inputs: Tensor, statistics: tuple[Tensor, Tensor] | None) -> Tensor:
    """Bytes to [0, 1]; then less the mean, over the deviation, where these are given."""
    if inputs.dtype == torch.uint8:
        inputs = inputs.float().div_(255)
    if statistics is not None:
        mean, std = (t.to(inputs.device) for t in statistics)
        inputs = (inputs - mean) / std
    return inputs


def input_range(inputs: Iterable[tuple[str, Tensor | Inputs]]) -> tuple[float, float] | None:
    """Smallest and largest of stored inputs once they are in [0, 1] if they are bytes; None: neither bytes nor floats.

    Every tensor is looked at once; of what is not in memory it is known.

    Args:
        inputs: (N, ...) each, with what they are of, for the message.

    Raises:
        UserError: an input is NaN or infinite; names its row.
    """
    seen, low, high = set[int](), math.inf, -math.inf
    for name, held in inputs:
        if id(held) in seen or not held.numel():
            continue
        seen.add(id(held))
        if held.dtype == torch.uint8:
            low, high = min(low, 0.0), max(high, 1.0)
        elif isinstance(held, Inputs):
            least, most = held.span or (low, high)
            low, high = min(low, least), max(high, most)
        elif held.is_floating_point():
            least, most = (float(end) for end in held.aminmax())  # NaN where any is
            if not math.isfinite(least) or not math.isfinite(most):
                raise UserError(f"stream: {name} inputs hold {_worst(held)} (valid: finite 32-bit numbers)")
            low, high = min(low, least), max(high, most)
    return None if low > high else (low, high)


def _worst(inputs: Tensor) -> str:
    """The first number of `inputs` (N, ...) that is not finite, and its row."""
    rows = (~inputs.isfinite()).flatten(1).any(1).nonzero()[:, 0].tolist()
    row = inputs[rows[0]].flatten()
    more = f" (and {len(rows) - 1} more rows)" if len(rows) > 1 else ""
    return f"{float(row[~row.isfinite()][0])} in row {rows[0]}{more}"
