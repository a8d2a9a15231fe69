"""The common corruptions, made in batches on the device of the images.

    corrupted = corrupt(images, "fog", 5, indices=rows, seed=0)        uint8 (B, C, H, W) in and out

What is random in a corrupted image depends on (seed, corruption, severity, index of the image) and on nothing else.

Source: Hendrycks and Dietterich, "Benchmarking Neural Network Robustness to Common Corruptions and Perturbations", ICLR
2019, arXiv:1903.12261. Compared with hendrycks/robustness (Apache-2.0), see tests/corruptions.
Differs: frost takes pictures made by a rule unless the reference's are at hand; heights and widths may differ; one
channel is taken for three equal ones; sizes other than 32 and 224 pixels take the constants of the family as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from clplat.data.corruptions.blur import defocus_blur, gaussian_blur, glass_blur, zoom_blur
from clplat.data.corruptions.constants import CODES, EXTRA, FAMILIES, NAMES, ORDERS, STANDARD, Family
from clplat.data.corruptions.digital import brightness, contrast, elastic_transform, pixelate, saturate
from clplat.data.corruptions.draws import Draws
from clplat.data.corruptions.jpeg import jpeg_compression
from clplat.data.corruptions.motion import motion_blur
from clplat.data.corruptions.noise import gaussian_noise, impulse_noise, shot_noise, speckle_noise
from clplat.data.corruptions.spatter import spatter
from clplat.data.corruptions.weather import fog, frost, snow
from clplat.errors import UserError

__all__ = ["CODES", "EXTRA", "NAMES", "ORDERS", "STANDARD", "Draws", "corrupt", "family_for"]

# Each: pixels (B, C, H, W) uint8, its constants, draws → grey levels, float32 divided by 255 or uint8.
FUNCTIONS: dict[str, Callable[[Tensor, Any, Draws], Tensor]] = {
    f.__name__: f
    for f in (
        gaussian_noise, shot_noise, impulse_noise, defocus_blur, glass_blur, motion_blur, zoom_blur, snow, frost, fog,
        brightness, contrast, elastic_transform, pixelate, jpeg_compression, speckle_noise, gaussian_blur, spatter,
        saturate,
    )
}  # fmt: skip
_COLOURED = ("snow", "frost", "brightness", "saturate", "spatter")  # defined for three channels
_LARGE = 128  # pixels from which a side takes the constants of ImageNet


def corrupt(
    images: Tensor,
    name: str,
    severity: int,
    *,
    indices: Tensor | None = None,
    seed: int = 0,
    family: Family | None = None,
    frost_folder: str | None = None,
) -> Tensor:
    """Corrupted copies of images, uint8 (B, C, H, W) on their device.

    Args:
        images: (B, C, H, W), C 1 or 3: uint8, or floating in [0, 1], rounded to grey levels first; NaN counts as 0.
        name: of the corruption, one of NAMES.
        severity: 1 to 5; 0 returns the images.
        indices: (B,) int64 number of each image in its data set, which its draws belong to; None counts from 0.
        seed: of all draws.
        family: whose constants; None goes by size: cifar below 128 pixels, else imagenet.
        frost_folder: with the reference's pictures of frost; None takes pictures made by a rule.

    Raises:
        UserError: an unknown corruption, severity or family, or another shape.
    """
    if name not in FUNCTIONS or severity not in range(6) or family not in (None, *FAMILIES):
        valid = f"{', '.join(FUNCTIONS)}; 0 to 5; {', '.join(FAMILIES)}"
        raise UserError(f"corruption: {name!r}, severity {severity!r}, family {family!r} (valid: {valid})")
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise UserError(f"corruption: images {tuple(images.shape)} (valid: (B, C, H, W), one or three channels)")
    pixels = to_bytes(images)
    if severity == 0 or pixels.numel() == 0:
        return pixels
    constants = FAMILIES[family or family_for(images.shape)][name][severity - 1]
    if name == "frost":
        constants = (*constants, frost_folder)
    indices = torch.arange(len(pixels), device=pixels.device) if indices is None else indices.to(pixels.device)
    draws = Draws(indices, seed, name, severity)
    if pixels.shape[1] == 1 and name in _COLOURED:
        coloured = FUNCTIONS[name](pixels.expand(-1, 3, -1, -1), constants, draws)
        return as_bytes(coloured.clamp(0, 1).mean(1, keepdim=True))
    return as_bytes(FUNCTIONS[name](pixels, constants, draws))


def family_for(shape: torch.Size | tuple[int, ...]) -> Family:
    """The constants for images of `shape` (..., H, W)."""
    return "imagenet" if max(shape[-2:]) >= _LARGE else "cifar"


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as bytes; uint8 as they are."""
    return (
        images if images.dtype == torch.uint8 else images.nan_to_num(0.0).clamp(0, 1).mul(255).round().to(torch.uint8)
    )


def as_bytes(image: Tensor) -> Tensor:
    """Grey levels, rounded down as in the reference; the summand makes up for the rounding of float32."""
    return image if image.dtype == torch.uint8 else image.clamp_(0, 1).mul_(255).add_(2**-9).to(torch.uint8)
