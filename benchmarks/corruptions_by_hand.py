"""The standard corruptions as one writes them for one image: NumPy, SciPy, Pillow; the constants of CIFAR, severity 5.

Written from the definitions (Hendrycks and Dietterich, ICLR 2019). Image (H, W, 3) uint8 in and out.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

Array = np.ndarray[Any, Any]


def _bytes(image: Array) -> Array:
    return np.asarray(np.clip(image, 0, 1) * 255).astype(np.uint8)


def gaussian_noise(image: Array, rng: np.random.Generator) -> Array:
    """σ 0.1."""
    return _bytes(image / 255 + rng.normal(size=image.shape, scale=0.1))


def shot_noise(image: Array, rng: np.random.Generator) -> Array:
    """50 photons."""
    return _bytes(rng.poisson(image / 255 * 50) / 50)


def impulse_noise(image: Array, rng: np.random.Generator) -> Array:
    """7 % of the values."""
    made = image.copy()
    flipped, white = rng.random(image.shape) < 0.07, rng.random(image.shape) < 0.5
    made[flipped & white], made[flipped & ~white] = 255, 0
    return made


def defocus_blur(image: Array, rng: np.random.Generator) -> Array:
    """A disk of radius 1.5, smoothed by σ 0.1."""
    at = np.arange(-8, 9)
    disk = (at[:, None] ** 2 + at**2 <= 2.25).astype(float)
    disk = ndimage.gaussian_filter(disk / disk.sum(), 0.1, radius=1)
    return _bytes(np.stack([ndimage.correlate(image[..., c] / 255, disk, mode="mirror") for c in range(3)], -1))


def glass_blur(image: Array, rng: np.random.Generator) -> Array:
    """σ 0.4, shifts of 1, two rounds."""
    height, width = image.shape[:2]
    made = (ndimage.gaussian_filter(image / 255, (0.4, 0.4, 0), mode="nearest") * 255).astype(np.uint8)
    for _ in range(2):
        for row in range(height - 1, 1, -1):
            for column in range(width - 1, 1, -1):
                across, down = rng.integers(-1, 1, size=2)
                made[row, column] = made[row + down, column + across]
    return _bytes(ndimage.gaussian_filter(made / 255, (0.4, 0.4, 0), mode="nearest"))


def _along(image: Array, radius: int, sigma: float, degrees: float) -> Array:
    taps = np.arange(2 * radius + 1)
    weights = np.exp(-(taps**2) / (2 * sigma**2))
    across = np.ceil(taps * np.cos(np.deg2rad(degrees)) - 0.5).astype(int)
    down = np.ceil(taps * np.sin(np.deg2rad(degrees)) - 0.5).astype(int)
    reach, (height, width) = 2 * radius + 1, image.shape[:2]
    padded = np.pad(image.astype(float), [(reach, reach)] * 2 + [(0, 0)] * (image.ndim - 2), mode="edge")
    made = np.zeros(image.shape)
    for weight, x, y in zip(weights / weights.sum(), across + reach, down + reach, strict=True):
        made += weight * padded[y : y + height, x : x + width]
    return (made + 1e-6).astype(np.uint8)


def motion_blur(image: Array, rng: np.random.Generator) -> Array:
    """Radius 9, σ 2.5."""
    return _along(image, 9, 2.5, rng.uniform(-45, 45))


def _zoomed(image: Array, factor: float) -> Array:
    size = len(image)
    part = int(np.ceil(size / factor))
    start = (size - part) // 2
    larger = ndimage.zoom(image[start : start + part, start : start + part], (factor, factor, 1), order=1)
    trim = (len(larger) - size) // 2
    return larger[trim : trim + size, trim : trim + size]


def zoom_blur(image: Array, rng: np.random.Generator) -> Array:
    """Factors 1 to 1.26 in steps of 0.01."""
    x, factors = image / np.float32(255), np.arange(1, 1.26, 0.01)
    return _bytes((x + sum(_zoomed(x, f) for f in factors)) / (len(factors) + 1))


def snow(image: Array, rng: np.random.Generator) -> Array:
    """As in the table of constants."""
    x = image / np.float32(255)
    layer = _zoomed(rng.normal(0.3, 0.3, x.shape[:2])[..., None], 1.25)[..., 0]
    layer = np.where(layer < 0.65, 0, layer)
    flakes = _along(_bytes(layer), 14, 12, rng.uniform(-135, -45))[..., None] / 255
    grey = (x @ np.array([0.299, 0.587, 0.114]))[..., None]
    return _bytes(0.8 * x + 0.2 * np.maximum(x, grey * 1.5 + 0.5) + flakes + flakes[::-1, ::-1])


FROST = [np.random.default_rng(i).integers(0, 256, (102, 102, 3), dtype=np.uint8) for i in range(5)]


def frost(image: Array, rng: np.random.Generator) -> Array:
    """A piece of one of five pictures."""
    picture, (height, width) = FROST[rng.integers(5)], image.shape[:2]
    row, column = rng.integers(0, 102 - height), rng.integers(0, 102 - width)
    laid = 0.75 * image + 0.45 * picture[row : row + height, column : column + width]
    return np.asarray(np.clip(laid, 0, 255)).astype(np.uint8)


def fog(image: Array, rng: np.random.Generator) -> Array:
    """Diamond-square noise, decay 1.75, amount 1.5."""
    size = len(image)
    heights, step, span = np.zeros((size, size)), size, 100.0
    while step >= 2:
        half = step // 2
        corners = heights[::step, ::step]

        def mean(total: Array, span: float = span) -> Array:
            return total / 4 + rng.uniform(-span * span, span * span, total.shape)

        pairs = corners + np.roll(corners, -1, 0)
        heights[half::step, half::step] = mean(pairs + np.roll(pairs, -1, 1))
        middles = heights[half::step, half::step]
        heights[::step, half::step] = mean(middles + np.roll(middles, 1, 0) + corners + np.roll(corners, -1, 1))
        heights[half::step, ::step] = mean(middles + np.roll(middles, 1, 1) + corners + np.roll(corners, -1, 0))
        step, span = half, span / 1.75
    heights -= heights.min()
    x = image / 255
    return _bytes((x + 1.5 * (heights / heights.max())[..., None]) * x.max() / (x.max() + 1.5))


def brightness(image: Array, rng: np.random.Generator) -> Array:
    """0.3 more of the value of HSV, there and back."""
    from matplotlib.colors import hsv_to_rgb, rgb_to_hsv

    hsv = rgb_to_hsv(image / 255)
    hsv[..., 2] = np.clip(hsv[..., 2] + 0.3, 0, 1)
    return _bytes(hsv_to_rgb(hsv))


def contrast(image: Array, rng: np.random.Generator) -> Array:
    """0.15 of the deviation from the mean."""
    x = image / 255
    mean = x.mean((0, 1), keepdims=True)
    return _bytes((x - mean) * 0.15 + mean)


def elastic_transform(image: Array, rng: np.random.Generator) -> Array:
    """An affine map and a displacement of 3.2, σ 0.96."""
    size, x = len(image), image / np.float32(255)
    start = np.array([[26, 26], [26, 6], [6, 6]], dtype=float)  # (x, y) of three points of a 32 x 32 image
    end = start + rng.uniform(-0.96, 0.96, start.shape)
    inverse = np.linalg.solve(np.column_stack([end, np.ones(3)]), start).T
    matrix, shift = inverse[::-1, 1::-1], inverse[::-1, 2]
    x = np.stack([ndimage.affine_transform(x[..., c], matrix, shift, order=1, mode="mirror") for c in range(3)], -1)
    across, down = (
        3.2 * ndimage.gaussian_filter(rng.uniform(-1, 1, (size, size)), 0.96, mode="reflect", truncate=3) for _ in "xy"
    )
    rows, columns = np.mgrid[:size, :size]
    at = [rows + down, columns + across]
    return _bytes(np.stack([ndimage.map_coordinates(x[..., c], at, order=1, mode="reflect") for c in range(3)], -1))


def pixelate(image: Array, rng: np.random.Generator) -> Array:
    """20 x 20 pixels."""
    small = Image.fromarray(image).resize((20, 20), Image.Resampling.BOX)
    return np.array(small.resize((32, 32), Image.Resampling.BOX))


def jpeg_compression(image: Array, rng: np.random.Generator) -> Array:
    """Quality 40, by libjpeg."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=40)
    return np.array(Image.open(file))


BY_HAND: dict[str, Callable[[Array, np.random.Generator], Array]] = {
    f.__name__: f
    for f in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
        brightness, contrast, elastic_transform, pixelate, jpeg_compression,
    )
}  # fmt: skip
