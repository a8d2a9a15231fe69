"""Blurs, zooms and resizings that work along rows and columns apart: one small matrix for each, cached.

An image X (H, W) becomes A X Bᵀ with A (H', H) and B (W', W), borders included:
two matrix products for a batch.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

SMALL = 1024  # pixels up to which one matrix over all of them is faster than anything else


def sandwich(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A X Bᵀ of each channel: images (..., H, W), rows (H', H), columns (W', W) → (..., H', W')."""
    return rows @ (images @ columns.T)


def whole(pixels: Tensor, matrix: Tensor) -> Tensor:
    """Any linear map of small images in one product: pixels (B, C, H, W) uint8 → float32 in grey levels / 255.

    Sums are exact in whatever order they are made, since the weights are multiples of 2⁻¹⁶ (see `exact`).
    """
    return (pixels.flatten(2).to(torch.float32) @ matrix).div_(255).view(pixels.shape)


def exact(matrix: np.ndarray, device: torch.device) -> Tensor:
    """(HW, HW) weights of each pixel of the result on each of the image, sum 1, for `whole`: float32, transposed.

    Rounded to multiples of 2⁻¹⁶; what a row loses by it goes to its largest weight.
    """
    units = np.round(matrix * 65536)
    largest = units.argmax(1)
    units[np.arange(len(units)), largest] += 65536 - units.sum(1)
    return torch.from_numpy(np.ascontiguousarray(units.T) / 65536).to(torch.float32).to(device)


def smooth(images: Tensor, sigma: float, mode: str = "nearest", truncate: float = 4.0) -> Tensor:
    """Gaussian blur of (..., H, W) float, σ in pixels; the border repeats itself or, with `reflect`, is mirrored."""
    matrices = [gaussian(n, sigma, mode, truncate, images.device) for n in images.shape[-2:]]
    return sandwich(images, *matrices)


@lru_cache(maxsize=64)
def gaussian(size: int, sigma: float, mode: str, truncate: float, device: torch.device) -> Tensor:
    """(size, size) float32. The kernel ends at `truncate` σ, as SciPy's does; σ = 0 is the identity."""
    radius = int(truncate * sigma + 0.5)
    offsets = np.arange(-radius, radius + 1)
    weights = np.exp(-0.5 * (offsets / sigma) ** 2) if sigma > 0 else np.ones(1)
    sources = np.arange(size)[:, None] + offsets
    sources = sources.clip(0, size - 1) if mode == "nearest" else mirrored(sources, size)
    matrix = np.zeros((size, size))
    np.add.at(matrix, (np.arange(size)[:, None], sources), weights / weights.sum())
    return torch.from_numpy(matrix).to(torch.float32).to(device)


def mirrored(positions: np.ndarray, size: int) -> np.ndarray:
    """Positions beyond the border read from its mirror image, edge pixel included: d c b a | a b c d | d c b a."""
    folded = positions % (2 * size)
    return np.where(folded < size, folded, 2 * size - 1 - folded)


def reflected(positions: np.ndarray, size: int) -> np.ndarray:
    """The same about the edge pixel, which is not repeated: d c b | a b c d | c b a."""
    if size == 1:
        return np.zeros_like(positions)
    folded = positions % (2 * size - 2)
    return np.where(folded < size, folded, 2 * size - 2 - folded)


def zoom_matrix(size: int, factor: float) -> np.ndarray:
    """(size, size) float64: the middle of an image, enlarged by `factor` ≥ 1, linear; ends of the grid on pixels.

    The part cut out is the least whole number of pixels that fills the image again; what is too much is cut off.
    """
    part = int(np.ceil(size / factor))
    start, enlarged = (size - part) // 2, max(round(part * factor), 1)
    at = np.arange(enlarged) * ((part - 1) / max(enlarged - 1, 1))
    left = np.minimum(np.floor(at + 1e-9).astype(int), part - 1)
    right, share = np.minimum(left + 1, part - 1), (at - left).clip(0, 1)
    matrix, rows = np.zeros((enlarged, size)), np.arange(enlarged)
    np.add.at(matrix, (rows, start + left), 1 - share)
    np.add.at(matrix, (rows, start + right), share)
    trim = (enlarged - size) // 2
    return matrix[trim : trim + size]


@lru_cache(maxsize=64)
def zooms(size: int, factors: tuple[float, ...], device: torch.device) -> Tensor:
    """(F, size, size) float32: a zoom for each factor."""
    return torch.from_numpy(np.stack([zoom_matrix(size, f) for f in factors])).to(torch.float32).to(device)


@lru_cache(maxsize=64)
def box(size: int, new_size: int, device: torch.device) -> Tensor:
    """(new_size, size) float32: Pillow's box filter: the mean of the pixels whose centre lies in the new one."""
    scale = size / new_size
    support = 0.5 * max(scale, 1.0)
    matrix = np.zeros((new_size, size))
    for i in range(new_size):
        centre = (i + 0.5) * scale
        start, end = max(int(centre - support + 0.5), 0), min(int(centre + support + 0.5), size)
        distance = (np.arange(start, end) - centre + 0.5) / max(scale, 1.0)
        inside = (distance > -0.5) & (distance <= 0.5)
        matrix[i, start:end][inside] = 1 / inside.sum()
    return torch.from_numpy(matrix).to(torch.float32).to(device)
