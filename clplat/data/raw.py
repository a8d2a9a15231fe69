"""Raw inputs, as users have them, to those that a stream holds: arrays, tensors, pictures, texts, observations.

What can be read in several ways, or not as the stream did, is refused.

Shapes: B samples, C channels, H rows, W columns.
"""

from __future__ import annotations

import warnings
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.arrays import CHANNELS, channel_axis
from clplat.data.pictures import FITS, WHITE, channels_first, pixels, stacked, stretched
from clplat.data.pixels import scaled
from clplat.data.prompts import Prompts
from clplat.data.tokens import Tokenizer, load_tokenizer, padded
from clplat.errors import UserError
from clplat.preprocessing import Preprocessing

_SLACK = 0.05  # by which pictures in [0, 1] may leave it, as resampling by splines does
_DEPTHS = {"u1": 255, "u2": 65535}  # unsigned integers that pictures are held in


class Raw:
    """Makes of raw inputs those that a stream held.

    Args:
        known: of the stream.
    """

    def __init__(self, known: Preprocessing) -> None:
        self.known = known

    def held(self, inputs: Any, task: int | None = None) -> Tensor:
        """(B, ...) as the stream held them: bytes, floats or token ids.

        Args:
            inputs: a sample or several: an array or tensor, or Pillow's images or texts, one or a list.
            task: of text, where the classes to choose from are those of the task.

        Raises:
            UserError: they are not such as the stream was made of.
            MissingError: the tokenizer is not there.
        """
        if reason := self.known.refused.get("all"):
            raise UserError(f"inputs: {reason} (valid: prepared ones, given to predict)")
        items = list(inputs) if isinstance(inputs, list | tuple) else [inputs]
        kinds = {"text" if isinstance(i, str) else "pictures" if _is_picture(i) else "numbers" for i in items}
        if len(kinds) > 1:
            raise UserError(f"inputs: a list of {' and '.join(sorted(kinds))} (valid: {self._takes()})")
        if kinds == {"text"}:
            return self._texts(items, task)
        return self._pictures(items) if kinds == {"pictures"} else self._numbers(inputs)

    def _takes(self) -> str:
        """What is valid, in words."""
        known, shape = self.known, "x".join(map(str, self.known.shape))
        if known.ids:
            return f"{'texts, or ' * (known.text is not None)}token ids ({shape})"
        if known.white is None:
            return f"{'floats' if len(known.shape) > 2 else 'numbers'} ({shape}) as in the run"
        plain = f"integers up to {known.white:g} or floats in [0, 1], ({shape})"
        return plain if "pictures" in known.refused or not self._sides else f"pictures; {plain}"

    @property
    def _sides(self) -> tuple[int, int, int] | None:
        """(C, H, W) where inputs are pictures."""
        shape = self.known.shape
        return (shape[0], shape[1], shape[2]) if len(shape) == 3 and shape[0] in CHANNELS else None

    # --- pictures -----------------------------------------------------------------------------------------------------

    def _pictures(self, items: list[Any]) -> Tensor:
        known, sides = self.known, self._sides
        if reason := known.refused.get("pictures"):
            raise UserError(f"inputs: pictures: {reason} (valid: {self._takes()})")
        if sides is None or known.white is None or sides[0] == 4:
            raise UserError(f"inputs: pictures, but this run does not take them (valid: {self._takes()})")
        channels, height, width = sides
        fit = None if known.fit == "none" else FITS[known.fit](height)
        found = [pixels(p, f"picture {i}", grey=channels == 1, fit=fit) for i, p in enumerate(items)]
        for number, picture in enumerate(found):
            if picture.shape[:2] != (height, width):
                what = f"picture {number} has {picture.shape[1]}x{picture.shape[0]} pixels"
                raise UserError(f"inputs: {what}, and this run scaled none (valid: {width}x{height})")
        deep = any(picture.dtype == np.uint16 for picture in found)
        return stacked(found, scale=(WHITE if known.white == 255 else known.white) if deep else None)[0]

    # --- numbers ------------------------------------------------------------------------------------------------------

    def _numbers(self, inputs: Any) -> Tensor:
        array = _array(inputs)
        if self.known.ids:
            return self._ids(array)
        array = self._placed(self._scaled(array))
        if array.dtype == np.uint8 or array.dtype == np.float32:
            return torch.from_numpy(np.require(array, requirements=["C", "W"]))
        return torch.from_numpy(array.astype(np.float32))

    def _ids(self, array: np.ndarray) -> Tensor:
        shape = self.known.shape
        sample = array.shape[1:] if array.ndim > len(shape) else array.shape
        if array.dtype.kind not in "iu" or len(sample) != len(shape) or sample[:-1] != shape[:-1]:
            raise UserError(f"inputs: {array.dtype} {array.shape} (valid: {self._takes()})")
        return torch.from_numpy(array.astype(np.int32).reshape(-1, *sample))

    def _scaled(self, array: np.ndarray) -> np.ndarray:
        """Bytes as they are; else floats, integers divided by what is white."""
        white, kind = self.known.white, array.dtype.str[1:]
        low, high = (array.min(), array.max()) if array.size else (0, 0)
        if white is None:
            if array.dtype.kind in "iu" and len(self.known.shape) > 2:
                what = f"{array.dtype} from {low} to {high}, and this run had floats"
                raise UserError(f"inputs: {what} (valid: {self._takes()})")
            return array.astype(np.float32)
        if array.dtype.kind in "bf":
            if low < -_SLACK or high > 1 + _SLACK:
                what = f"{array.dtype} from {low:g} to {high:g}, whose range is not that of this run"
                raise UserError(f"inputs: {what} (valid: {self._takes()})")
            return array
        own = _DEPTHS.get(kind) if white in _DEPTHS.values() else None
        bytes_in_words = own == 65535 and white == 255 and 0 < high <= 255
        if bytes_in_words or (own is None and (low < 0 or high > white or np.iinfo(array.dtype).max < white)):
            what = f"{array.dtype} from {low} to {high}, whose range is not that of this run"
            raise UserError(f"inputs: {what} (valid: {self._takes()})")
        factor = white if own is None else own
        return array if array.dtype == np.uint8 and factor == 255 else array.astype(np.float32) / np.float32(factor)

    def _placed(self, array: np.ndarray) -> np.ndarray:
        """(B, ...), pictures with their channels first; a single sample becomes a batch of one."""
        shape, sides = self.known.shape, self._sides
        forms: list[tuple[tuple[int, ...], bool]] = [(shape, False)]
        if sides is not None:
            channels, height, width = sides
            forms += [((height, width, channels), True)] + ([((height, width), False)] if channels == 1 else [])
            if channels == height == width and self.known.layout != "channels_first":
                raise UserError(f"inputs: the axis of the channels of {array.shape} can't be told (valid: prepared "
                                "inputs, given to predict)")  # fmt: skip
        for form, last in forms:
            if array.ndim in (len(form), len(form) + 1) and array.shape[array.ndim - len(form) :] == form:
                batch = array.reshape(-1, *form)
                return batch.transpose(0, 3, 1, 2) if last else batch.reshape(-1, *shape)
        if self.known.stretched and array.dtype == np.uint8 and (found := _bytes_first(array)) is not None:
            return stretched(found, shape[-1]).numpy()
        raise UserError(f"inputs: {array.dtype} {array.shape} (valid: {self._takes()}, one or several)")

    # --- texts --------------------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """That of the run.

        Raises:
            UserError: it gives other ids than that of the run did.
        """
        assert self.known.text is not None
        name = self.known.text["tokenizer"]
        found = load_tokenizer(name)
        if found.fingerprint != self.known.text["fingerprint"]:
            raise UserError(f"stream.tokenizer: {name!r} is not the one that this run was made with: it gives other ids"
                            " (valid: that one; or token ids)")  # fmt: skip
        return found

    def _texts(self, items: list[Any], task: int | None) -> Tensor:
        """(B, 2, L) of prompts."""
        text, choices = self.known.text, self.known.choices
        if text is None:
            raise UserError(f"inputs: text, but this run does not take it (valid: {self._takes()})")
        if choices and (task is None or not 0 <= task < len(choices)):
            raise UserError(f"task: {task}, but each task has answers of its own (valid: 0 to {len(choices) - 1})")
        prompts = Prompts(self.tokenizer, text["chat"], text["max_length"], text.get("cue", True))
        rows, cut = prompts.framed(self.tokenizer.encode(prompts.said(items)))
        if cut:
            what = f"{len(cut)} of {len(rows)} texts lose {prompts.lost} ({max(cut)} at most"
            warnings.warn(f"stream.max_length: {what}, of which {text['max_length']} stay)", stacklevel=4)
        longest = max((len(row) for row in rows), default=0)
        if longest > self.known.shape[-1]:
            what = f"a prompt of {longest} tokens, and the run had none above {self.known.shape[-1]}"
            warnings.warn(f"inputs: {what}: what its model makes of it was not seen", stacklevel=4)
        named = list(choices[task]) if choices and task is not None else []
        table = torch.full((len(rows), 2, max(longest, len(named), 1)), -1, dtype=torch.int32)
        table[:, 0] = padded(rows, table.shape[2])
        table[:, 1, : len(named)] = torch.tensor(named, dtype=torch.int32)
        return table

    # --- observations -------------------------------------------------------------------------------------------------

    def observations(self, inputs: Any) -> tuple[np.ndarray, bool]:
        """(E, o) float32 of one or E observations as an environment gives them, flat or not; whether it was one."""
        acting = self.known.acting or {}
        if isinstance(inputs, dict):
            if sorted(inputs) != sorted(acting.get("keys", ())):
                raise UserError(f"inputs: an observation of {sorted(inputs)} (valid: {acting.get('keys') or 'flat'})")
            return np.concatenate([np.ravel(inputs[key]) for key in acting["keys"]]).astype(np.float32)[None], True
        array, flat = _array(inputs), self.known.shape
        if "channels" in acting and array.dtype.kind in "ui":  # images of bytes, as the environment gives them
            own = tuple(acting["shape"])
            if array.shape[-3:] != own or array.ndim > 4:
                raise UserError(f"inputs: images {array.shape} (valid: ({'x'.join(map(str, own))}), one or several)")
            return scaled(array, acting["channels"]).reshape(-1, *flat), array.ndim == 3
        for form in (flat,) if "channels" in acting else (flat, tuple(acting.get("shape", flat))):
            if array.ndim in (len(form), len(form) + 1) and array.shape[array.ndim - len(form) :] == form:
                return array.astype(np.float32).reshape(-1, *flat), array.ndim == len(form)
        raise UserError(f"inputs: observations {array.shape} (valid: ({'x'.join(map(str, flat))}), one or several)")


def _is_picture(value: Any) -> bool:
    """Whether it is an image of Pillow, told without importing it."""
    return hasattr(value, "convert") and hasattr(value, "getbands")


def _plain(value: Any) -> Any:
    """A tensor as NumPy can read it; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().cpu()
    return value.float() if value.is_floating_point() else value


def _array(value: Any) -> np.ndarray:
    """`value` as an array of finite numbers, floats of 32 bits.

    Raises:
        UserError: it holds anything else.
    """
    try:
        several = isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value)
        array = np.stack([_array(item) for item in value]) if several else np.asarray(_plain(value))
    except ValueError as error:
        raise UserError(f"inputs: are of several shapes ({error})") from error
    if array.dtype.kind not in "biuf":
        raise UserError(f"inputs: {array.dtype} (valid: numbers, Pillow's images, texts)")
    array = array.astype(np.float32) if array.dtype.kind == "f" else array.astype(array.dtype.newbyteorder("="))
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise UserError("inputs: hold NaN or infinite numbers (valid: finite 32-bit numbers)")
    return array


def _bytes_first(array: np.ndarray) -> Tensor | None:
    """Pictures (B, C, H, W) of bytes with C 1 or 3 in any layout that can be told; None for anything else."""
    if array.ndim == 2 or (array.ndim == 3 and array.shape[0] not in CHANNELS and array.shape[2] not in CHANNELS):
        return torch.from_numpy(array[None, None] if array.ndim == 2 else array[:, None])
    batch = array[None] if array.ndim == 3 else array
    axis = channel_axis(batch.shape) if batch.ndim == 4 else None
    found = None if axis is None else channels_first(batch) if axis == 3 else torch.from_numpy(batch)
    return found if found is not None and found.shape[1] in (1, 3) else None
