"""Motion blur as ImageMagick defines it: half a Gaussian along a line of whole pixels, from each pixel one way.

Checked against ImageMagick 6.9.11 (MotionBlurImage). Shapes: B images, T taps.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.data.corruptions.draws import Draws

_PIECE = 1 << 16  # values blurred at a time on a CPU


def motion_blur(pixels: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """Along one line an image, its angle between −45° and 45°; grey levels are rounded down."""
    angles = draws.uniform(1, low=-45.0, high=45.0).squeeze(1)
    return along(pixels, *constants, angles).div_(255)


def along(pixels: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Blur (B, C, H, W) uint8 along lines at `degrees` (B,), to whole grey levels, float32; the border repeats."""
    taps = 2 * math.ceil(radius) + 1
    at = torch.arange(taps, dtype=torch.float64)
    weights = torch.exp(-at.square() / (2 * sigma * sigma))
    order = degrees.argsort()
    turn = torch.deg2rad(degrees[order].double().cpu())[:, None]
    across = torch.ceil(at * turn.cos() - 0.5).long()  # (B, T)
    down = torch.ceil(at * turn.sin() - 0.5).long()
    made = torch.empty(pixels.shape, device=pixels.device)
    step = max(_PIECE // pixels[0].numel(), 1) if pixels.device.type == "cpu" else len(pixels)
    for start in range(0, len(pixels), step):  # pieces that a cache holds
        piece = slice(start, start + step)
        made[order[piece]] = _shifted(
            pixels[order[piece]], (weights / weights.sum()).tolist(), across[piece], down[piece]
        )
    return made.add_(2**-10).floor_().clamp_(0, 255)


def _shifted(pixels: Tensor, weights: list[float], across: Tensor, down: Tensor) -> Tensor:
    """The weighted sum of each image's shifted selves: `across` and `down` (b, T) pixels, in order of the angles.

    Images whose lines have the same pixel at a tap lie side by side, and take it as one view of their padded selves.
    """
    left, top = -int(across.min()), -int(down.min())
    right, bottom = int(across.max()), int(down.max())
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels.to(torch.float32), (left, right, top, bottom + 1), mode="replicate")
    # Rows stay as wide as padded, so that a shift moves one piece of memory; what is beside the image is cut off.
    stride = padded.shape[-1]
    padded = padded.flatten(2)
    summed = torch.zeros(*pixels.shape[:2], height * stride, device=pixels.device)
    places = (down + top) * stride + across + left
    for weight, place in zip(weights, places.T, strict=True):
        changes = (place[1:] != place[:-1]).nonzero().squeeze(1).tolist()
        for start, end in pairwise([0, *(i + 1 for i in changes), len(pixels)]):
            first = int(place[start])
            summed[start:end].add_(padded[start:end, :, first : first + height * stride], alpha=weight)
    return summed.unflatten(-1, (height, stride))[..., :width]
