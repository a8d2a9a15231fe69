"""Blur: defocus, glass, zoom and Gaussian. Pixels (B, C, H, W) uint8 in, float32 in grey levels / 255 out."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.data.corruptions.draws import Draws
from clplat.data.corruptions.linear import SMALL, exact, reflected, smooth, whole, zoom_matrix, zooms

_LARGE = 121  # taps from which a kernel is applied by Fourier transform


def gaussian_blur(pixels: Tensor, sigma: float, draws: Draws) -> Tensor:
    """A Gaussian of σ pixels."""
    return smooth(pixels / 255, float(sigma))


def defocus_blur(pixels: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """A disk, its rim smoothed; the border is mirrored about the edge pixel."""
    kernel = disk(*map(float, constants), pixels.device)
    if pixels[0, 0].numel() <= SMALL:
        return whole(pixels, _defocus_matrix(*map(float, constants), *pixels.shape[-2:], pixels.device))
    radius = len(kernel) // 2
    rows, columns = (
        torch.from_numpy(reflected(np.arange(-radius, n + radius), n)).to(pixels.device) for n in pixels.shape[-2:]
    )
    padded = (pixels / 255)[:, :, rows][:, :, :, columns].flatten(0, 1)  # (BC, H + 2r, W + 2r)
    if kernel.numel() < _LARGE:
        blurred = F.conv2d(padded[:, None], kernel[None, None])
    else:
        shape = padded.shape[-2:]
        product = torch.fft.rfft2(padded) * torch.fft.rfft2(kernel, s=shape)  # symmetric: correlation = convolution
        blurred = torch.fft.irfft2(product, s=shape)[:, 2 * radius :, 2 * radius :]
    return blurred.reshape(pixels.shape)


@lru_cache(maxsize=16)
def _defocus_matrix(radius: float, sigma: float, height: int, width: int, device: torch.device) -> Tensor:
    """(HW, HW) of `whole`."""
    kernel = disk(radius, sigma, torch.device("cpu")).double().numpy()
    at = np.arange(len(kernel)) - len(kernel) // 2
    rows = reflected(np.arange(height)[:, None] + at, height)  # (H, K)
    columns = reflected(np.arange(width)[:, None] + at, width)
    sources = rows[:, None, :, None] * width + columns[None, :, None, :]  # (H, W, K, K)
    matrix = np.zeros((height * width, height * width))
    places = np.arange(height * width).reshape(height, width, 1, 1)
    np.add.at(matrix, (np.broadcast_to(places, sources.shape), sources), np.broadcast_to(kernel, sources.shape))
    return exact(matrix, device)


@lru_cache(maxsize=32)
def disk(radius: float, sigma: float, device: torch.device) -> Tensor:
    """(K, K) float32, sum 1: pixels within `radius`, smoothed over 3 × 3 (5 × 5 beyond radius 8); zeros cut off."""
    reach, width = (8, 1) if radius <= 8 else (int(radius), 2)
    at = np.arange(-reach, reach + 1)
    filled = (at[:, None] ** 2 + at**2 <= radius**2).astype(float)
    taps = np.exp(-0.5 * (np.arange(-width, width + 1) / sigma) ** 2)
    sources = reflected(np.arange(len(at))[:, None] + np.arange(-width, width + 1), len(at))
    rim = np.zeros((len(at), len(at)))
    np.add.at(rim, (np.arange(len(at))[:, None], sources), taps / taps.sum())
    kernel = rim @ (filled / filled.sum()) @ rim.T
    used = int(np.abs(at)[(kernel > 1e-9).any(0)].max())
    kernel = kernel[reach - used : reach + used + 1, reach - used : reach + used + 1]
    return torch.from_numpy(kernel).to(torch.float32).to(device)


def zoom_blur(pixels: Tensor, constants: tuple[float, float], draws: Draws) -> Tensor:
    """The mean of the image and its enlargements by 1, 1 + step, ... up to the end."""
    factors = tuple(np.arange(1, constants[0], constants[1]).tolist())
    height, width = pixels.shape[-2:]
    if height * width <= SMALL:
        return whole(pixels, _zoom_matrix(height, width, factors, pixels.device))
    rows, columns = zooms(height, factors, pixels.device), zooms(width, factors, pixels.device)
    image = (pixels / 255).flatten(0, 1)  # (BC, H, W)
    summed = image.clone()
    for a, b in zip(rows, columns, strict=True):
        summed = torch.baddbmm(summed, a.expand(len(image), height, height), image @ b.T)
    return summed.div_(len(factors) + 1).view(pixels.shape)


@lru_cache(maxsize=16)
def _zoom_matrix(height: int, width: int, factors: tuple[float, ...], device: torch.device) -> Tensor:
    """(HW, HW) of `whole`."""
    matrix = np.eye(height * width)
    for factor in factors:
        matrix += np.kron(zoom_matrix(height, factor), zoom_matrix(width, factor))
    return exact(matrix / (len(factors) + 1), device)


def glass_blur(pixels: Tensor, constants: tuple[float, int, int], draws: Draws) -> Tensor:
    """A slight blur, pixels shuffled locally, a slight blur.

    Pixels are visited from the last to the first, and each takes the value of one at most `shift` rows and columns
    away, which may already have been visited. (The reference means to swap the two, but what it swaps are views, so
    that one value is lost; the published files come from this.) Each pixel thus points at another one, and what it ends
    up with is found for all at once, by following two pointers at a time.
    """
    sigma, shift, rounds = constants
    height, width = pixels.shape[-2:]
    blurred = (smooth(pixels / 255, float(sigma)) * 255 + 2**-10).to(torch.uint8)
    for _ in range(rounds):
        sources = _sources(draws, height, width, shift)
        blurred = blurred.flatten(2).gather(2, sources[:, None].expand(-1, pixels.shape[1], -1)).view_as(pixels)
    return smooth(blurred / 255, float(sigma))


def _sources(draws: Draws, height: int, width: int, shift: int) -> Tensor:
    """(B, HW) int64: where each pixel's value comes from after one round."""
    rows = torch.arange(height - shift, shift, -1, device=draws.device)
    columns = torch.arange(width - shift, shift, -1, device=draws.device)
    # Two numbers a pixel, in the order of the visits: first across, then down.
    moves = draws.integers(-shift, shift, len(rows), len(columns), 2)
    visited = (rows[:, None] * width + columns).expand(len(moves), -1, -1)
    targets = moves[..., 1] * width + moves[..., 0] + (rows[:, None] * width + columns)
    size = height * width
    pointers = torch.arange(size, device=draws.device).repeat(len(moves), 1)
    pointers.scatter_(1, visited.flatten(1), targets.flatten(1))
    if shift == 1:  # moves are up and left only, to pixels still to be visited
        return pointers
    # Slot s + size is what pixel s held before the round. A pixel points there unless its target was visited before.
    here = torch.arange(size, device=draws.device)
    row, column = pointers // width, pointers % width
    inside = (row > shift) & (row <= height - shift) & (column > shift) & (column <= width - shift)
    before = inside & (pointers > here)  # visits go from last to first
    chain = torch.cat([torch.where(before, pointers, pointers + size), (here + size).expand(len(moves), -1)], dim=1)
    while True:
        further = chain.gather(1, chain)
        if torch.equal(further, chain):
            return chain[:, :size] - size
        chain = further
