"""A column of pictures or numbers of the package `datasets` to inputs: tensors, or read from its Arrow files.

Shapes: N rows of a part, C channels, H rows and W columns of a picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data import arrow
from clplat.data.arrays import as_inputs
from clplat.data.decoded import decoded
from clplat.data.on_disk import stays
from clplat.data.pictures import WHITE, pixels, squeezed, stacked
from clplat.errors import MissingError, UserError
from clplat.inputs import Inputs

Samples = Sequence[Tensor | Inputs]  # of each part
Found = tuple[Samples, list[str], dict[str, Any]]  # samples, lines to say, `Stream.origin`


@dataclass(frozen=True)
class Options:
    """The options of the stream `huggingface`, which explains them."""

    size: int | None
    grey: bool
    scale: float | None
    in_memory: bool | None
    workers: int | None


def inputs_of(
    parts: Sequence[Any], column: str, rows: Sequence[np.ndarray] | None, options: Options, what: str
) -> Found:
    """Each part's pictures as (N, C, H, W), or numbers as (N, ...) floats; lines that say what was not sure; and
    `Stream.origin`.

    Args:
        parts: data sets of the package.
        rows: of the only part, those of each part that it is cut into; None: it is not cut.
        what: they are, for messages.

    Raises:
        UserError: neither pictures nor numbers; inputs that can be read in several ways, or can't stay on disk.
        MissingError: a picture can't be read.
    """
    first, count = next(iter(_rows(parts[0], column, 1)), None), sum(len(part[column]) for part in parts)
    pictures, notes = hasattr(first, "convert"), list[str]()
    if stays(options.in_memory, count * _bytes(first, options), what, notes):
        found = _left(parts, column, rows, options, pictures)
        if not isinstance(found, str):
            return found[0], found[1] + notes, found[2]
        if options.in_memory is False:
            raise UserError(f"stream.in_memory: false, but {found} (valid: null)")
    values = [_rows(part, column, None) for part in parts]
    pictures = any(hasattr(value, "convert") for part in values for value in part)
    samples, said, origin = _pictures(values, options) if pictures else _numbers(values, options)
    return samples if rows is None else [samples[0][torch.from_numpy(r)] for r in rows], said, origin


def _rows(part: Any, column: str, count: int | None) -> list[Any]:
    """The first `count` values of a column, or all; pictures are decoded here."""
    try:
        return list(part[column] if count is None else part[column][:count])
    except (OSError, SyntaxError) as error:
        raise MissingError(f"stream.inputs: a picture of column {column!r} can't be read ({error})") from error


def _bytes(value: Any, options: Options) -> int:
    """That a value takes in memory."""
    if not hasattr(value, "convert"):
        return 4 * np.size(value)
    width, height = value.size if options.size is None else (options.size,) * 2
    return (1 if options.grey else 3) * width * height


def _pictures(parts: Sequence[list[Any]], options: Options) -> Found:
    fit = None if options.size is None else squeezed(options.size)
    for part in parts:
        empty = next((row for row, value in enumerate(part) if not hasattr(value, "convert")), None)
        if empty is not None:
            raise UserError(f"stream.inputs: row {empty} holds {type(part[empty]).__name__} (valid: pictures)")
    rows = [[pixels(v, f"the picture in row {i}", grey=options.grey, fit=fit) for i, v in enumerate(p)] for p in parts]
    found = stacked(*rows, scale=options.scale)
    return found, [], _origin(found[0], options)


def _origin(images: Tensor | Inputs, options: Options) -> dict[str, Any]:
    deep = {"white": options.scale or WHITE} if images.dtype != torch.uint8 else {}
    return {"fit": "none" if options.size is None else "squeezed"} | deep


def _numbers(parts: Sequence[list[Any]], options: Options) -> Found:
    _check_no_pictures(options)
    try:
        arrays = [np.array(part) for part in parts]
        arrays = [a[:, None] if a.ndim == 1 else a for a in arrays]
    except (ValueError, TypeError) as error:
        raise UserError(f"stream.inputs: neither images nor numbers of one length ({error})") from error
    if any(a.dtype.kind not in "biuf" for a in arrays):
        raise UserError(f"stream.inputs: neither images nor numbers of one length, but {arrays[0].dtype}")
    return _scaled({f"split {i}": a for i, a in enumerate(arrays)}, options)


def _check_no_pictures(options: Options) -> None:
    if options.size is not None or options.grey:
        raise UserError("stream.size, stream.grey: have no meaning for numbers (valid: null, false)")


def _scaled(arrays: dict[str, Any], options: Options) -> Found:
    made, notes, white = as_inputs(arrays, scale=options.scale, workers=options.workers)
    return list(made.values()), notes, {} if white is None else {"white": white}


def _left(
    parts: Sequence[Any], column: str, rows: Sequence[np.ndarray] | None, options: Options, pictures: bool
) -> Found | str:
    """As `inputs_of`, of inputs that stay in their files; or why they can't."""
    files = [[Path(f["filename"]) for f in getattr(part, "cache_files", ())] for part in parts]
    if not all(files):
        return f"column {column!r} is not in Arrow files"
    if pictures:
        if mode := next((m for part in parts if (m := part.features[column].mode)), None):
            return f"column {column!r} is converted to the mode {mode}"
        places = [arrow.pictures(of, column) for of in files]
        if why := next((found for found in places if isinstance(found, str)), None):
            return why
        held: list[Any] = places if rows is None else [[places[0][i] for i in r.tolist()] for r in rows]
        images = decoded(held, size=options.size, grey=options.grey, scale=options.scale, workers=options.workers,
                         fits=squeezed)  # fmt: skip
        return images, [], _origin(images[0], options)
    _check_no_pictures(options)
    arrays: dict[str, Any] = {f"split {i}": arrow.numbers(of, column, f"split {i}") for i, of in enumerate(files)}
    if why := next((found for found in arrays.values() if isinstance(found, str)), None):
        return why
    if rows is not None:
        (whole,) = arrays.values()
        arrays = {f"split 0, part {i}": replace(whole, chosen=r) for i, r in enumerate(rows)}
    return _scaled(arrays, options)
