"""Pictures that stay in their files and are decoded when a batch of them is asked for.

Shapes: N pictures, H rows, W columns, C channels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
from torch import Tensor

from clplat.data.on_disk import Member, Place, remembered
from clplat.data.pictures import Fit, agreed, in_floats, measured, middle, read_head, read_picture
from clplat.errors import MissingError
from clplat.inputs import Inputs, default_workers


class Decoded(Inputs):
    """Pictures (N, C, H, W) as `stacked` would hold them.

    Args:
        paths: of their files.
        shape: (C, H, W) that all have once they fit.
        fit: resizes or cuts them; None: they are of that size.
        white: what is white in those of 16 bits, and all come as floats; None: none has so many, and all are bytes.
        highest: number in those of 16 bits.
        workers: threads that decode, ≥ 1; None: `default_workers`.
    """

    def __init__(
        self, paths: Sequence[Place], shape: tuple[int, int, int], *, fit: Fit | None = None,
        white: float | None = None, highest: int = 0, workers: int | None = None,
    ) -> None:  # fmt: skip
        span = None if white is None else (0.0, max(1.0, highest / white))
        super().__init__((len(paths), *shape), torch.uint8 if span is None else torch.float32, span=span,
                         workers=workers)  # fmt: skip
        self.names = np.array([_encoded(p) for p in paths])  # a few dozen bytes each, where a Path takes hundreds
        self.fit, self.white = fit, white

    def path(self, row: int) -> Place:
        """Of the picture in a row."""
        first, *more = os.fsdecode(self.names[row]).split("\0")
        return Member(Path(first), int(more[0]), int(more[1]), more[2]) if more else Path(first)

    def read(self, rows: list[int], out: Tensor) -> None:
        held = out.numpy()
        for place, row in enumerate(rows):
            picture = read_picture(self.path(row), grey=self.shape[1] == 1, fit=self.fit)
            picture = picture if self.white is None else in_floats(picture, self.white)
            found = picture.transpose(2, 0, 1)
            if found.shape != held.shape[1:] or found.dtype != held.dtype:
                what = f"{self.path(row)} is {found.shape} {found.dtype}, not {held.shape[1:]} {held.dtype}"
                raise MissingError(f"stream: {what} as when it was looked at first: put back the picture of then")
            held[place] = found


def decoded(
    parts: Sequence[Sequence[Place]], *, size: int | None, grey: bool, scale: float | None, workers: int | None,
    fits: Callable[[int], Fit] = middle,
) -> list[Decoded]:  # fmt: skip
    """The pictures of each part, left in their files; of all of them the heads are read, once.

    Args:
        size, grey, scale: as in `clplat.data.folders.read_pictures`.
        workers: threads, ≥ 1; None: `default_workers`.
        fits: makes pictures be of a size.

    Raises:
        UserError, MissingError: as `stacked` and `read_picture` do, as far as the heads tell.
    """
    every, fit = [path for part in parts for path in part], None if size is None else fits(size)
    told = [PIL.__version__, size, grey, fits.__name__]

    def heads() -> Any:
        found = set(pool.map(read_head, every))
        return sorted({(height, width) for height, width, _ in found}), any(deep for *_, deep in found)

    def highest() -> int:
        return max(pool.map(lambda path: _highest(path, grey, fit), every))

    with ThreadPoolExecutor(workers or default_workers()) as pool:
        sides, deep = remembered("heads", every, told, heads)
        most = remembered("highest", every, told, highest) if deep else None
    channels = 1 if grey else 3
    shapes = {(*side, channels) if size is None else (size, size, channels) for side in map(tuple, sides)}
    white = agreed(shapes, most, "stream.size", scale)
    ((height, width, _),) = shapes
    options: dict[str, Any] = {"fit": fit, "white": white, "highest": most or 0, "workers": workers}
    return [Decoded(part, (channels, height, width), **options) for part in parts]


def statistics(images: Tensor | Inputs) -> tuple[list[float], list[float]]:
    """`measured`; of pictures in files only once."""
    if not isinstance(images, Decoded):
        return measured(images)
    files = (images.path(row) for row in range(len(images)))
    told = [PIL.__version__, *images.shape, images.fit is None, images.white]
    mean, deviation = remembered("statistics", files, told, lambda: measured(images))
    return mean, deviation


def _encoded(path: Place) -> bytes:
    """Without a NUL at its end, which NumPy would cut off."""
    parts = (path.tar, str(path.offset), str(path.size), path.name) if isinstance(path, Member) else (path,)
    return b"\0".join([os.fsencode(part) for part in parts])


def _highest(path: Place, grey: bool, fit: Fit | None) -> int:
    """Largest number of a picture of 16 bits; 0 of others."""
    found = read_picture(path, grey=grey, fit=fit) if read_head(path)[2] else np.zeros(1, np.uint8)
    return int(found.max()) if found.dtype == np.uint16 else 0
