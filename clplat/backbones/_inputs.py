"""How a pretrained network wants its images: their size, how they are brought to it, mean and standard deviation.

Shapes: B images, C channels, H rows, W columns.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from clplat.errors import UserError
from clplat.stream import Statistics

Interpolation = Literal["nearest", "bilinear", "bicubic"]
CropMode = Literal["center", "squash", "border"]


@dataclass(frozen=True)
class Preprocessing:
    """What weights were trained to be evaluated with, in timm's terms.

    Args:
        size: (height, width) of what the network is given.
        interpolation: by which images are scaled.
        crop: share of the scaled image's side that is kept, in (0, 1].
        crop_mode: center scales the shorter side, squash each side by its own factor, border the longer one and fills
            up the other.
        statistics: mean and standard deviation of each channel of images in [0, 1].
    """

    size: tuple[int, int]
    interpolation: Interpolation
    crop: float
    crop_mode: CropMode
    statistics: Statistics

    @classmethod
    def of(cls, known: dict[str, Any]) -> Preprocessing:
        """From timm's `pretrained_cfg`, with timm's own defaults for what it leaves out."""
        from timm.data import resolve_data_config

        found = resolve_data_config(pretrained_cfg=known)
        mean, std = list(found["mean"]), list(found["std"])
        _, height, width = found["input_size"]
        return cls((height, width), found["interpolation"], found["crop_pct"], found["crop_mode"], (mean, std))


@dataclass(frozen=True)
class Fit:
    """Scales images to (height, width) `scaled`, and cuts `size` out of their middle.

    As timm's transforms do with a picture, but for the rounding to bytes after each of the two directions.
    """

    scaled: tuple[int, int]
    size: tuple[int, int]
    interpolation: Interpolation

    def __call__(self, images: Tensor, bounded: bool) -> Tensor:
        """Images (B, C, H, W) to (B, C, *size). `bounded`: they lie in [0, 1], which bicubic scaling would leave."""
        smooth: dict[str, Any] = {} if self.interpolation == "nearest" else {"align_corners": False, "antialias": True}
        for side in (
            (images.shape[2], self.scaled[1]),
            self.scaled,
        ):  # as Pillow: one direction, then the other
            if side != tuple(images.shape[2:]):
                images = F.interpolate(images, side, mode=self.interpolation, **smooth)
                images = images.clamp(0, 1) if bounded else images
        top, left = (round((whole - part) / 2) for whole, part in zip(self.scaled, self.size, strict=True))
        return images[:, :, top : top + self.size[0], left : left + self.size[1]]

    def __str__(self) -> str:
        whole, part = (f"{height}x{width}" for height, width in (self.scaled, self.size))
        cut = "" if whole == part else f", and their middle {part} cut out"
        return f"scaled to {whole} ({self.interpolation}){cut}"


def fitted(
    shape: tuple[int, int], size: tuple[int, int], how: Preprocessing | None, interpolation: Interpolation | None,
    crop: float | None,
) -> Fit | None:  # fmt: skip
    """How images of (height, width) `shape` are brought to `size`; None where they have it and no crop is asked for.

    Args:
        how: what holds where `interpolation` and `crop` are None; None: bicubic, and nothing is cut.

    Raises:
        UserError: images that are no squares, and a way of timm's that is not offered for those.
    """
    if size == shape and crop is None:
        return None
    mode, share = "center" if how is None else how.crop_mode, crop or (1.0 if how is None else how.crop)
    inner = math.floor(size[0] / share), math.floor(size[1] / share)
    if mode == "border" and shape[0] != shape[1]:
        raise UserError(
            f"backbone.image_size: this model fills up images that are no squares, as {shape[0]}x{shape[1]}, which is "
            "not offered (valid: square images)"
        )
    if mode == "center":
        short, long = min(shape), max(shape)
        other = int(max(inner) * long / short)
        inner = (max(inner), other) if shape[0] <= shape[1] else (other, max(inner))
    return Fit(inner, size, interpolation or ("bicubic" if how is None else how.interpolation))
