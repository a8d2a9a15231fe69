"""Pictures of frost: those of the reference where a folder holds them, else made by a rule.

The reference (hendrycks/robustness, Apache-2.0) lays one of its first five pictures, frost1.png to frost5.jpg, over an
image. They are photographs of unstated origin and so are not shipped. The pictures made here have their place: bright,
bluish, with needles of ice grown from a few seeds and fine grain between them. Error rates under frost made here are
not those of the published files.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clplat.data.corruptions.draws import Draws
from clplat.data.corruptions.linear import smooth
from clplat.errors import MissingError

FILES = ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg")
_SIDE = 512
_TINT = (0.86, 0.97, 1.05)


@lru_cache(maxsize=8)
def pictures(folder: str | None, scale: float, side: int, device: torch.device) -> tuple[Tensor, ...]:
    """Pictures of frost (3, H, W) uint8, each side longer than `side` pixels.

    Args:
        folder: holds FILES; None makes pictures.
        scale: factor on their size, linear between pixels.
        side: of the images they are laid over.

    Raises:
        MissingError: a file is missing or can't be read.
    """
    found = [_read(Path(folder, name)) for name in FILES] if folder else _made()
    scaled = [_resized(p, scale) for p in found]
    while min(min(p.shape[1:]) for p in scaled) <= side:  # larger images than the pictures were taken for
        scaled = [torch.cat([torch.cat([p, p.flip(2)], 2), torch.cat([p.flip(1), p.flip(1, 2)], 2)], 1) for p in scaled]
    return tuple(p.to(device) for p in scaled)


def _read(path: Path) -> Tensor:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, ValueError) as error:
        raise MissingError(
            f"{path} can't be read ({error}): put the frost pictures there, or take the folder away"
        ) from (error)


def _resized(picture: Tensor, scale: float) -> Tensor:
    """By a factor, linear, pixels taken as squares, no smoothing before (as OpenCV's resize)."""
    if scale == 1:
        return picture
    size = [round(n * scale) for n in picture.shape[1:]]
    small = torch.nn.functional.interpolate(picture[None].float(), size=size, mode="bilinear", align_corners=False)
    return small[0].add_(0.5).floor_().to(torch.uint8)


def _made() -> list[Tensor]:
    """Five pictures, always the same ones."""
    draws = Draws(torch.arange(len(FILES)), "frost")
    grain = draws.normal(_SIDE, _SIDE)
    ice = sum(smooth(grain, s) * s * w for s, w in ((1.0, 0.3), (3.0, 0.4), (12.0, 0.5)))
    ice = 0.35 * torch.as_tensor(ice) + _needles(draws, 40, 28)
    ice = ice - ice.mean((1, 2), keepdim=True)
    ice = 0.55 + 0.2 * ice / ice.std((1, 2), keepdim=True)
    return [(torch.stack([t * p for t in _TINT]).clamp(0, 1) * 255).to(torch.uint8) for p in ice]


def _needles(draws: Draws, seeds: int, arms: int) -> Tensor:
    """(5, side, side): straight needles that fade outwards from random seeds."""
    count, reach = draws.count, 160
    centre = draws.uniform(seeds, 1, 1, 2) * _SIDE
    angle = draws.uniform(seeds, arms, 1) * (2 * torch.pi)
    length = draws.uniform(seeds, arms, 1) * reach
    at = torch.arange(reach) / reach * length  # (5, seeds, arms, reach)
    points = centre + torch.stack([at * angle.sin(), at * angle.cos()], dim=-1)
    place = points.round().long() % _SIDE
    light = (1 - torch.arange(reach) / reach).expand(count, seeds, arms, reach)
    canvas = torch.zeros(count, _SIDE * _SIDE)
    canvas.scatter_reduce_(1, (place[..., 0] * _SIDE + place[..., 1]).flatten(1), light.flatten(1), "amax")
    return smooth(canvas.view(count, _SIDE, _SIDE), 0.8) * 1.5
