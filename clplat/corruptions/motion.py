"""Motion blur as ImageMagick defines it: half a Gaussian along a line of whole pixels, from each pixel one way.

Checked against ImageMagick 6.9.11 (MotionBlurImage). Shapes: B images, T taps.
"""

from __future__ import annotations

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.corruptions.draws import Draws


def motion_blur(pixels: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """Along one line an image, its angle between −45° and 45°; grey levels are rounded down."""
    angles = draws.uniform(1, low=-45.0, high=45.0).squeeze(1)
    return along(pixels, *constants, angles).div_(255)


def along(pixels: Tensor, radius: float, sigma: float, degrees: Tensor) -> Tensor:
    """Blur (B, C, H, W) uint8 along lines at `degrees` (B,), to whole grey levels, float32; the border repeats itself.

    Images are put in order of their angles: those whose line has the same pixel at a tap then lie side by side, and
    take it as one shifted view of their padded selves.
    """
    taps = 2 * math.ceil(radius) + 1
    at = torch.arange(taps, dtype=torch.float64)
    weights = torch.exp(-at.square() / (2 * sigma * sigma))
    weights = (weights / weights.sum()).tolist()
    order = degrees.argsort()
    turn = torch.deg2rad(degrees[order].double().cpu())[:, None]
    across = torch.ceil(at * turn.cos() - 0.5).long()  # (B, T)
    down = torch.ceil(at * turn.sin() - 0.5).long()
    left, top = -int(across.min()), -int(down.min())
    right, bottom = int(across.max()), int(down.max())
    height, width = pixels.shape[-2:]
    padded = F.pad(pixels[order].to(torch.float32), (left, right, top, bottom), mode="replicate")
    summed = torch.zeros(pixels.shape, device=pixels.device)
    for tap, weight in enumerate(weights):
        x, y = across[:, tap] + left, down[:, tap] + top
        changes = ((x[1:] != x[:-1]) | (y[1:] != y[:-1])).nonzero().squeeze(1).tolist()
        bounds = [0, *(i + 1 for i in changes), len(pixels)]
        for start, end in pairwise(bounds):
            i, j = int(y[start]), int(x[start])
            summed[start:end].add_(padded[start:end, :, i : i + height, j : j + width], alpha=weight)
    return torch.empty_like(summed).index_copy_(0, order, summed).add_(2**-10).floor_().clamp_(0, 255)
