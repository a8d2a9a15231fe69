"""Digital corruptions and changes of colour: brightness, contrast, saturation, elastic, pixelate.

Pixels (B, C, H, W) uint8 in, float32 in grey levels / 255 out. What needs colours takes three channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.data.corruptions.draws import Draws
from clplat.data.corruptions.linear import box, sandwich, smooth

_STEPS = 32  # of a pixel: OpenCV rounds the coordinates of an affine map to these


def brightness(pixels: Tensor, amount: float, draws: Draws) -> Tensor:
    """The value of HSV plus an amount. Hue and saturation stay, so all channels grow by the same factor."""
    image = pixels / 255
    value = image.amax(1, keepdim=True)
    brighter = (value + amount).clamp_(max=1)
    return torch.where(value > 0, image * (brighter / value.clamp(min=1e-9)), brighter)


def saturate(pixels: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """The saturation of HSV times a factor plus a summand. Value and hue stay; the hue of greys is that of red."""
    factor, summand = constants
    image = pixels / 255
    value, least = image.amax(1, keepdim=True), image.amin(1, keepdim=True)
    span = value - least
    saturation = (span / value.clamp(min=1e-9) * factor + summand).clamp_(0, 1)
    red = torch.tensor([0.0, 1.0, 1.0], device=pixels.device).view(1, 3, 1, 1)
    missing = torch.where(span > 0, (value - image) / span.clamp(min=1e-9), red)  # in [0, 1]: 0 where the value is
    return value - value * saturation * missing


def contrast(pixels: Tensor, factor: float, draws: Draws) -> Tensor:
    """The deviation from each channel's mean times a factor."""
    image = pixels / 255
    mean = image.mean((-2, -1), keepdim=True)
    return (image - mean).mul_(factor).add_(mean)


def pixelate(pixels: Tensor, scale: float, draws: Draws) -> Tensor:
    """Fewer, larger pixels: down and up again with Pillow's box filter, rounded after each direction."""
    height, width = pixels.shape[-2:]
    small_height, small_width = max(int(height * scale), 1), max(int(width * scale), 1)
    image = pixels.to(torch.float32)
    image = (image @ box(width, small_width, pixels.device).T).add_(0.5).floor_()
    image = (box(height, small_height, pixels.device) @ image).add_(0.5).floor_()
    up = box(small_height, height, pixels.device), box(small_width, width, pixels.device)
    return sandwich(image, *up).div_(255)


def elastic_transform(pixels: Tensor, constants: tuple[float, float, float], draws: Draws) -> Tensor:
    """A random affine map, then a smooth random displacement of every pixel, both linear between pixels."""
    amount, sigma, corner = constants
    height, width = pixels.shape[-2:]
    moved = _warp(pixels / 255, _affine(draws.uniform(3, 2, low=-corner, high=corner), height, width), True)
    shifts = [
        smooth(draws.uniform(height, width, low=-1.0), float(sigma), "reflect", 3.0) * amount for _ in range(2)
    ]  # across, then down
    across, down = shifts
    columns = torch.arange(width, device=pixels.device) + across
    rows = torch.arange(height, device=pixels.device)[:, None] + down
    return _warp(moved, torch.stack([columns, rows], dim=-1), False)


def _affine(jitter: Tensor, height: int, width: int) -> Tensor:
    """Where each pixel of the result comes from, (B, H, W, 2) as (column, row): three points near the middle move.

    Args:
        jitter: (B, 3, 2) how far the points move, in pixels.
    """
    middle, reach = torch.tensor([height // 2, width // 2], dtype=torch.float64), min(height, width) // 3
    start = torch.stack([middle + reach, torch.stack([middle[0] + reach, middle[1] - reach]), middle - reach])
    start = start.to(jitter.device)
    end = start + jitter.double()
    ones = torch.ones_like(end[..., :1])
    # The inverse map M (2, 3) takes the moved points (x, y, 1) back to where they were.
    inverse = torch.linalg.solve(torch.cat([end, ones], dim=-1), start.expand_as(end)).mT  # (B, 2, 3)
    columns = torch.arange(width, device=jitter.device, dtype=torch.float64)
    rows = torch.arange(height, device=jitter.device, dtype=torch.float64)
    # In steps of 1/32 pixel, from sums in steps of 1/1024.
    scaled = inverse[:, None, None] * 1024  # (B, 1, 1, 2, 3)
    by_column = torch.round(scaled[..., 0] * columns[:, None])  # (B, 1, W, 2)
    by_row = torch.round(scaled[..., 1] * rows[:, None, None] + scaled[..., 2])  # (B, H, 1, 2)
    steps = torch.floor((by_column + by_row + 1024 / _STEPS / 2) * (_STEPS / 1024))
    return (steps / _STEPS).float()


def _warp(image: Tensor, at: Tensor, about_edge: bool) -> Tensor:
    """Read (B, C, H, W) at (B, H, W, 2) (column, row), linear; beyond the border from its mirror image.

    Args:
        about_edge: mirrored about the edge pixels' centres, else about their outer sides.
    """
    size = torch.tensor([image.shape[-1], image.shape[-2]], device=image.device)
    grid = at * (2 / (size - 1).clamp(min=1)) - 1 if about_edge else (at + 0.5) * (2 / size) - 1
    return F.grid_sample(image, grid, mode="bilinear", padding_mode="reflection", align_corners=about_edge)
