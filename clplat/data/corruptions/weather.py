"""Weather: snow, frost and fog. Pixels (B, C, H, W) uint8 in, float32 in grey levels / 255 out; C is 3."""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.data.corruptions import textures
from clplat.data.corruptions.draws import Draws
from clplat.data.corruptions.linear import sandwich, zooms
from clplat.data.corruptions.motion import along

_LUMA = (0.299, 0.587, 0.114)


def snow(pixels: Tensor, constants: tuple[float, ...], draws: Draws) -> Tensor:
    """Flakes that fall along a line, drawn twice, the second time turned by 180°, on a whitened image."""
    mean, deviation, zoom, threshold, radius, sigma, kept = constants
    height, width = pixels.shape[-2:]
    layer = draws.normal(height, width) * deviation + mean
    layer = sandwich(layer, *(zooms(n, (float(zoom),), pixels.device)[0] for n in (height, width)))
    layer = layer.masked_fill_(layer < threshold, 0).clamp_(0, 1)
    angles = draws.uniform(1, low=-135.0, high=-45.0).squeeze(1)
    flakes = along((layer * 255).to(torch.uint8)[:, None], radius, sigma, angles).div_(255)
    image = pixels / 255
    grey = (image * torch.tensor(_LUMA, device=pixels.device).view(1, 3, 1, 1)).sum(1, keepdim=True)
    image = image * kept + torch.maximum(image, grey * 1.5 + 0.5) * (1 - kept)
    return image + (flakes + flakes.flip(-2, -1))


def frost(pixels: Tensor, constants: tuple[float, float, float, str | None], draws: Draws) -> Tensor:
    """A piece of a picture of frost laid over the image."""
    image_weight, frost_weight, scale, folder = constants
    height, width = pixels.shape[-2:]
    pictures = textures.pictures(folder, scale, max(height, width), pixels.device)
    which = draws.integers(0, len(pictures), 1).squeeze(1)
    top, left = draws.uniform(2, 1).unbind(1)
    layer = torch.empty(pixels.shape, dtype=torch.uint8, device=pixels.device)
    for number, picture in enumerate(pictures):
        chosen = (which == number).nonzero().squeeze(1)
        if len(chosen):
            layer[chosen] = _pieces(picture, top[chosen], left[chosen], height, width)
    return (pixels.to(torch.float32).mul_(image_weight).add_(layer, alpha=frost_weight)).div_(255)


def _pieces(picture: Tensor, top: Tensor, left: Tensor, height: int, width: int) -> Tensor:
    """Pieces (b, 3, height, width) of a picture (3, H, W); top and left (b, 1) in [0, 1) of where they can start."""
    starts = picture.unfold(1, height, 1).unfold(2, width, 1)  # (3, tops, lefts, height, width), a view
    rows, columns = (top * (picture.shape[1] - height)).long(), (left * (picture.shape[2] - width)).long()
    return starts[:, rows.squeeze(1), columns.squeeze(1)].transpose(0, 1)


def fog(pixels: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """A cloud of fractal noise, the whole then darkened to the range that the image had."""
    amount, decay = constants
    image = pixels / 255
    brightest = image.amax((1, 2, 3), keepdim=True)
    height, width = image.shape[-2:]
    cloud = plasma(draws, 1 << (max(height, width, 2) - 1).bit_length(), decay)[:, None, :height, :width]
    return (image + amount * cloud) * (brightest / (brightest + amount))


def plasma(draws: Draws, size: int, decay: float) -> Tensor:
    """(B, size, size) in [0, 1] by diamond-square on a torus; `size` a power of two.

    At each scale the middles of the squares, then those of their sides, become the mean of four neighbours plus noise,
    whose span falls by `decay` from scale to scale.
    """
    heights = torch.zeros(draws.count, size, size, device=draws.device)
    step, span = size, 100.0
    while step >= 2:
        half, cells = step // 2, size // step

        def noise(cells: int = cells, span: float = span) -> Tensor:
            return draws.uniform(cells, cells, low=-span * span, high=span * span)

        corners = heights[:, ::step, ::step]
        pairs = corners + corners.roll(-1, 1)
        heights[:, half::step, half::step] = (pairs + pairs.roll(-1, 2)) / 4 + noise()
        middles = heights[:, half::step, half::step]
        sides = middles + middles.roll(1, 1) + corners + corners.roll(-1, 2)
        heights[:, ::step, half::step] = sides / 4 + noise()
        sides = middles + middles.roll(1, 2) + corners + corners.roll(-1, 1)
        heights[:, half::step, ::step] = sides / 4 + noise()
        step, span = half, span / decay
    lowest, highest = heights.amin((1, 2), keepdim=True), heights.amax((1, 2), keepdim=True)
    return (heights - lowest) / (highest - lowest).clamp(min=1e-9)
