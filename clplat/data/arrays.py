"""Plain arrays to inputs that a model can take: which axis holds the channels, and which number is white.

Shapes: N samples, C channels, H rows, W columns, D features.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clplat.data.on_disk import ArrayFile, ArrayFiles
from clplat.errors import UserError
from clplat.inputs import Inputs

Layout = Literal["channels_first", "channels_last"]
CHANNELS = (1, 3, 4)  # numbers of channels that pictures have
_EXACT = 2**24  # integers up to here are exact as 32-bit floats
_DEPTHS = {"u1": 255, "u2": 65535}  # unsigned integers that pictures are held in


def numbers(key: str, value: Any) -> np.ndarray:
    """`value` as an array of numbers, in the machine's byte order.

    Raises:
        UserError: it holds anything else.
    """
    array = value.detach().cpu() if isinstance(value, Tensor) else value
    array = array.float() if isinstance(array, Tensor) and array.is_floating_point() else array
    array = np.asarray(array)
    if array.dtype.kind not in "biuf":
        raise UserError(f"stream: {key} holds {array.dtype} (valid: numbers)")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


class ArrayInputs(Inputs):
    """The array of a file, read a few rows at a time, as `as_inputs` makes inputs of an array in memory.

    Args:
        file: whose rows they are.
        layout: as in `as_inputs`.
        factor: that numbers are divided by.
        workers: threads that read, ≥ 1; None: `default_workers`.
    """

    def __init__(self, file: ArrayFile | ArrayFiles, layout: Layout | None, factor: float, workers: int | None) -> None:
        none = _held(file.key, np.empty((0, *file.shape[1:]), file.dtype), layout, factor)
        floats = none.dtype == np.float32
        span = tuple(float(np.float32(end) / np.float32(factor)) for end in file.ends()) if floats else None
        super().__init__((file.shape[0], *none.shape[1:]), torch.float32 if floats else torch.uint8,
                         span=span, workers=workers)  # type: ignore[arg-type]  # fmt: skip
        self.file, self.layout, self.factor = file, layout, factor

    def read(self, rows: list[int], out: Tensor) -> None:
        out.numpy()[:] = _held(self.file.key, self.file.rows(rows), self.layout, self.factor)


def as_inputs(
    parts: Mapping[str, Any], layout: Layout | None = None, scale: float | None = None, workers: int | None = None
) -> tuple[dict[str, Tensor | Inputs], list[str], float | None]:
    """Bytes (N, ...) or 32-bit floats of each part, images as (N, C, H, W); lines that say what was not sure; and the
    number that is white, None where all are taken as they are.

    Args:
        parts: key → array or tensor, (N, D), (N, H, W), (N, C, H, W), (N, H, W, C), or any (N, ...), or such an array
            in a file, which stays there; parts are alike.
        layout: of (N, ·, ·, ·); None tells by `channel_axis`.
        scale: that inputs are divided by, > 0; None: 255 for bytes, 65535 for 16-bit images, 1 for anything else.
        workers: threads that read what is in files, ≥ 1; None: `default_workers`.

    Raises:
        UserError: no numbers; parts that differ; a layout or a range that can't be told.
    """
    if scale is not None and not scale > 0:
        raise UserError(f"stream.scale: {scale!r} is out of range (valid: > 0, or null)")
    arrays = {
        key: value if isinstance(value, ArrayFile | ArrayFiles) else numbers(key, value) for key, value in parts.items()
    }
    kinds = {(a.shape[1:], a.dtype) for a in arrays.values()}
    if len(kinds) > 1 or any(a.ndim < 2 for a in arrays.values()):
        shapes = " and ".join(f"{key} {a.shape[1:]} {a.dtype}" for key, a in arrays.items())
        raise UserError(f"stream: inputs differ: {shapes} (valid: (N, ...), of one shape and type)")
    ends = [end for a in arrays.values() if a.shape[0] for end in _ends(a, scale)]
    low, high = (min(ends), max(ends)) if ends else (0, 0)
    key, first = next(iter(arrays.items()))
    factor, note = _scale(key, first, low, high, scale), []
    if first.dtype.kind == "f" and first.ndim > 2 and scale is None and low >= 0 and high > 1.5:
        note = [f"stream.scale: {key} reach from {low:g} to {high:g} and are taken as they are ({high:g}: in [0, 1])"]
    if first.ndim == 4 and layout is None and channel_axis(first.shape) == 3:
        note.append(f"stream.layout: channels_last, by the sides of {key} {first.shape}")
    made: dict[str, Tensor | Inputs] = {
        key: ArrayInputs(array, layout, factor, workers)
        if isinstance(array, ArrayFile | ArrayFiles)
        else torch.from_numpy(np.require(_held(key, array, layout, factor), requirements=["C", "W"]))
        for key, array in arrays.items()
    }
    return made, note, None if factor == 1 else factor


def _ends(array: np.ndarray | ArrayFile | ArrayFiles, scale: float | None) -> tuple[Any, ...]:
    """Smallest and largest number; none where that takes a look at all of a file and nothing follows from it."""
    if isinstance(array, np.ndarray):
        return (array.min(), array.max()) if array.size else ()
    return array.ends() if scale is None or array.dtype.kind == "f" else ()


def _held(key: str, array: np.ndarray, layout: Layout | None, factor: float) -> np.ndarray:
    """What stands for `array` (N, ...): images with channels first; bytes, or 32-bit floats over `factor`."""
    array = _placed(key, array, layout)
    if array.dtype != np.uint8 or factor != 255:
        array = array.astype(np.float32, copy=False)
        array = array if factor == 1 else array / np.float32(factor)
    return array


def channel_axis(shape: tuple[int, ...]) -> int | None:
    """Axis of the channels in images of `shape` (N, a, b, c): 1 or 3, or None where it can't be told.

    By which of a and c is a picture's number of channels, and by which leaves a square; the two must not disagree.
    """
    _, a, b, c = shape
    votes = {3 if c in CHANNELS else 1} if (a in CHANNELS) != (c in CHANNELS) else set()
    votes |= {3 if a == b else 1} if (a == b) != (b == c) else set()
    return votes.pop() if len(votes) == 1 else None


def _placed(key: str, array: np.ndarray, layout: Layout | None) -> np.ndarray:
    """Images with their channels on axis 1; anything else as it is."""
    if array.ndim == 3 and (array.dtype.kind == "b" or array.dtype in (np.uint8, np.uint16)):
        return array[:, None]
    if array.ndim != 4:
        if layout is not None:
            raise UserError(f"stream.layout: {layout!r} has no meaning for {key} {array.shape} (valid: null)")
        return array
    axis = channel_axis(array.shape) if layout is None else {"channels_first": 1, "channels_last": 3}.get(layout)
    if axis is None:
        what = f"the channels of {key} {array.shape} can't be told from rows and columns"
        raise UserError(f"stream.layout: {what} (valid: channels_first, channels_last)")
    return array if axis == 1 else array.transpose(0, 3, 1, 2)


def _scale(key: str, array: np.ndarray | ArrayFile | ArrayFiles, low: Any, high: Any, scale: float | None) -> float:
    """What inputs are divided by."""
    if scale is not None:
        return scale
    white = _DEPTHS.get(array.dtype.str[1:])
    if white is not None and (array.ndim > 2 or white == 255):
        if 0 < high < white // 4:  # two bits unused, in all of the data
            what = f"{key} are {array.dtype} up to {high}, not {white}"
            raise UserError(f"stream.scale: {what} (valid: the number that is white, as {high}, or {white})")
        return float(white)
    if array.dtype.kind in "iu" and array.ndim > 2:
        what = f"{key} are {array.dtype} from {low} to {high}, whose range is not known"
        raise UserError(f"stream.scale: {what} (valid: the number that is white, as 255; or uint8, uint16, floats)")
    if array.dtype.kind in "iu" and max(abs(int(low)), abs(int(high))) > _EXACT:
        what = f"{key} are {array.dtype} from {low} to {high}, not exact in 32 bits"
        raise UserError(f"stream.scale: {what} (valid: a number to divide them by, or floats)")
    return 1.0
