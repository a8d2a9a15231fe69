"""Noise: Gaussian, shot, impulse and speckle. Pixels (B, C, H, W) uint8 in, float32 in grey levels / 255 out."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from clplat.data.corruptions.draws import Draws

_GUIDE = 10  # bits of a draw that point into the table of counts


def gaussian_noise(pixels: Tensor, deviation: float, draws: Draws) -> Tensor:
    """x + σ z."""
    return draws.normal(*pixels.shape[1:]).mul_(deviation).add_(pixels / 255)


def speckle_noise(pixels: Tensor, deviation: float, draws: Draws) -> Tensor:
    """x + σ x z."""
    return draws.normal(*pixels.shape[1:]).mul_(deviation).add_(1).mul_(pixels / 255)


def impulse_noise(pixels: Tensor, share: float, draws: Draws) -> Tensor:
    """A share of the values becomes 0 or 1, one as likely as the other."""
    numbers = draws.halves(*pixels.shape[1:])
    half = round(share * 2**15)  # of 2¹⁶ numbers
    pepper, salt = numbers < half - 2**15, numbers >= 2**15 - half
    return pixels.masked_fill(pepper, 0).masked_fill(salt, 255)


def shot_noise(pixels: Tensor, photons: float, draws: Draws) -> Tensor:
    """Poisson(photons · x) / photons, by inversion: the least count whose probability reaches the draw."""
    guide, table = _poisson(float(photons), pixels.device)
    words = draws.words(*pixels.shape[1:]).view(-1)
    grey = pixels.reshape(-1).to(torch.int32)
    cell = ((words >> (32 - _GUIDE)) + (1 << (_GUIDE - 1))).add_(grey << _GUIDE)
    counts = guide.index_select(0, cell).to(torch.int32)
    draw = (words >> 8).to(torch.float32).add_(2.0**23 + 0.5).mul_(2.0**-24)  # in (0, 1)
    place = counts + grey.mul_(table.shape[1])
    short = (table.view(-1).index_select(0, place) < draw).nonzero().squeeze(1)  # a few in a hundred
    while len(short):
        counts[short] += 1
        place[short] += 1
        short = short[table.view(-1)[place[short]] < draw[short]]
    return (counts / photons).view_as(pixels)


@lru_cache(maxsize=32)
def _poisson(photons: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where to start looking, and P(N ≤ k) for each grey level.

    Returns:
        guide (256 · 1024,) int16: count at the lower end of each cell of draws; table (256, K) float32.
    """
    from scipy.stats import poisson

    rates = np.arange(256) / 255 * photons
    length = int(poisson.isf(1e-9, photons)) + 2
    table = poisson.cdf(np.arange(length)[None], rates[:, None]).astype(np.float32)
    table[:, -1] = 1
    ends = np.arange(1 << _GUIDE, dtype=np.float32) / (1 << _GUIDE)
    guide = np.stack([np.searchsorted(row, ends, side="left") for row in table]).astype(np.int16)
    return torch.from_numpy(guide.ravel()).to(device), torch.from_numpy(table).to(device)
