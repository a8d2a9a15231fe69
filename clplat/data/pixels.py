"""Images as observations: those that an environment gives, or pictures of it; channels first, in [0, 1].

Shapes: C channels, H, W; P side of a square picture, S of them in one observation.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from clplat.errors import UserError

Layout = Literal["first", "last"]
STACK = 3  # S, pictures seen at once: one tells no speed (Yarats et al., ICLR 2021, arXiv:2004.13649)


def layout_of(name: str, space: Any) -> Layout:
    """Where the channels of an image space are: the axis that is shorter than both others, first or last.

    Raises:
        UserError: neither is, or the numbers are not bytes.
    """
    a, b, c = space.shape
    if space.dtype != np.uint8 or not (a < min(b, c) or c < min(a, b)):
        raise UserError(
            f"stream.env: {name} has observations of {space.dtype} {space.shape} (valid: vectors, or images of bytes "
            "whose channels are fewer than their rows and columns)"
        )
    return "first" if a < min(b, c) else "last"


def scaled(images: np.ndarray, layout: Layout) -> np.ndarray:
    """Images (..., C, H, W) float32 in [0, 1], of bytes in their own layout."""
    return (np.moveaxis(images, -1, -3) if layout == "last" else images).astype(np.float32) / 255


class Pictures:
    """The last S pictures of an environment as one image (3 S, P, P); before the first there is its repetition.

    Args:
        side: P > 0.
    """

    def __init__(self, side: int) -> None:
        self.side = side
        self.seen = np.zeros((STACK, 3, side, side), np.float32)

    def add(self, picture: np.ndarray, first: bool) -> np.ndarray:
        """What is seen after `picture` (H, W, 3) of bytes, the first of an episode or not."""
        image = torch.from_numpy(scaled(np.ascontiguousarray(picture), "last"))[None]
        small = F.interpolate(image, (self.side, self.side), mode="area")[0].numpy()
        self.seen = np.stack([small] * STACK) if first else np.concatenate([self.seen[1:], small[None]])
        return self.seen.reshape(-1, self.side, self.side)
