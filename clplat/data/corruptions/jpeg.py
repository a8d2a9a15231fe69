"""A JPEG round trip for a batch, without a codec: what the lossy steps of libjpeg do to the pixels.

Colour transform, halving of the chroma both ways (4:2:0), 8 × 8 cosine transform, quantisation with the tables of ITU-T
T.81 annex K at a quality, and back, with libjpeg's roundings, its scaling of the tables and its triangle filter for the
chroma. The entropy coding in between loses nothing, and so is left out.

Shapes: B images, C channels (1 or 3), H rows, W columns.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.data.corruptions.draws import Draws

_LUMA = (
    16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56, 14, 17, 22, 29, 51,
    87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92, 49, 64, 78, 87, 103, 121, 120, 101,
    72, 92, 95, 98, 112, 100, 103, 99,
)  # fmt: skip
_CHROMA = (
    17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99, 47, 66, 99, 99, 99,
    99, 99, 99, *(99,) * 32,
)  # fmt: skip


def jpeg_compression(pixels: Tensor, quality: int, draws: Draws) -> Tensor:
    """Pixels (B, C, H, W) uint8 → float32 in grey levels / 255, all of them whole levels."""
    return round_trip(pixels.to(torch.float32), quality).div_(255)


def round_trip(pixels: Tensor, quality: int) -> Tensor:
    """Whole grey levels (B, C, H, W) float32 → the same after compression at a quality from 1 to 100."""
    height, width = pixels.shape[-2:]
    if pixels.shape[1] == 1:
        return _plane(pixels, quality, _LUMA)
    red, green, blue = pixels.split(1, dim=1)
    luma = ((19595 / 65536) * red + (38470 / 65536) * green + (7471 / 65536) * blue).add_(0.5).floor_()
    cb = ((-11059 / 65536) * red - (21709 / 65536) * green + 0.5 * blue).add_(128.5 - 2**-16).floor_()
    cr = (0.5 * red - (27439 / 65536) * green - (5329 / 65536) * blue).add_(128.5 - 2**-16).floor_()
    luma = _plane(luma, quality, _LUMA)
    chroma = _plane(_halve(torch.cat([cb, cr])), quality, _CHROMA)[..., : -(-width // 2)]
    chroma = _double(chroma)[..., :height, :width].sub_(128)
    cb, cr = chroma.chunk(2)
    red = luma + ((91881 / 65536) * cr).add_(0.5).floor_()
    green = luma + ((-22554 / 65536) * cb - (46802 / 65536) * cr).add_(0.5).floor_()
    blue = luma + ((116130 / 65536) * cb).add_(0.5).floor_()
    return torch.cat([red, green, blue], dim=1).clamp_(0, 255)


def _halve(planes: Tensor) -> Tensor:
    """Means of 2 × 2 pixels, halves rounded up and down in turn, columns repeated up to a whole block."""
    height, width = planes.shape[-2:]
    planes = F.pad(planes, (0, -width % 16, 0, height % 2), mode="replicate")
    sums = planes[..., ::2, ::2] + planes[..., ::2, 1::2] + planes[..., 1::2, ::2] + planes[..., 1::2, 1::2]
    turn = torch.arange(sums.shape[-1], device=planes.device) % 2 + 1
    return ((sums + turn) / 4).floor_()


def _double(planes: Tensor) -> Tensor:
    """Twice as many rows and columns; each pixel is 9/16, 3/16, 3/16, 1/16 of the nearest four, rounded."""
    framed = F.pad(planes, (0, 0, 1, 1), mode="replicate")
    rows = torch.stack([3 * planes + framed[..., :-2, :], 3 * planes + framed[..., 2:, :]], dim=-2)
    rows = rows.flatten(-3, -2)  # (..., 2 H, W), four times too large
    framed = F.pad(rows, (1, 1, 0, 0), mode="replicate")
    left = (3 * rows + framed[..., :-2]).add_(8)
    right = (3 * rows + framed[..., 2:]).add_(7)
    return torch.stack([left, right], dim=-1).flatten(-2).div_(16).floor_()


def _plane(planes: Tensor, quality: int, table: tuple[int, ...]) -> Tensor:
    """Quantise the cosine transform of each 8 × 8 block of (N, 1, H, W), levels 0 to 255, and transform back."""
    height, width = planes.shape[-2:]
    padded = F.pad(planes, (0, -width % 8, 0, -height % 8), mode="replicate") - 128
    cosine, steps = _cosine(planes.device), _steps(quality, table, planes.device)
    blocks = padded.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-3, -2)  # (..., H/8, W/8, 8, 8)
    # Rows, then columns; a first pass keeps two more bits, the second leaves eighths.
    eighths = _shift(cosine @ _shift(blocks @ cosine.T, 11), 15)
    levels = (eighths.abs() + 4 * steps).div_(8 * steps).floor_().mul_(eighths.sign_())  # halves away from 0
    blocks = _shift(_shift(cosine.T @ levels.mul_(steps), 11) @ cosine, 18).add_(128).clamp_(0, 255)
    return blocks.transpose(-3, -2).flatten(-4, -3).flatten(-2)[..., :height, :width]


def _shift(values: Tensor, bits: int) -> Tensor:
    """Divide by 2^bits and round, halves up, in place."""
    return values.mul_(2.0**-bits).add_(0.5).floor_()


@lru_cache(maxsize=4)
def _cosine(device: torch.device) -> Tensor:
    """(8, 8) float32: √8 times the orthonormal cosine transform in units of 2⁻¹³, with libjpeg's roundings.

    They come from the factorisation of Loeffler, Ligtenberg and Moschytz (ICASSP 1989), whose eleven constants are
    rounded to whole units; the backward transform is the transpose.
    """

    def unit(constant: float) -> int:
        return round(constant * 8192)

    a, b, c = unit(0.541196100), unit(0.765366865), unit(1.847759065)
    even = [[8192, 8192], [a + b, a], [8192, -8192], [a, a - c]]  # on x0 ± x3 and x1 ± x2 of the folded samples
    shared = unit(1.175875602)
    near, far = unit(0.899976223), unit(2.562915447)
    inner, outer = unit(1.961570560), unit(0.390180644)
    own = [unit(v) for v in (1.501321110, 3.072711026, 2.053119869, 0.298631336)]
    odd = [  # rows 1, 3, 5, 7 on x0 − x7, x1 − x6, x2 − x5, x3 − x4
        [own[0] - near - outer + shared, shared, shared - outer, shared - near],
        [shared, own[1] - far - inner + shared, shared - far, shared - inner],
        [shared - outer, shared - far, own[2] - far - outer + shared, shared],
        [shared - near, shared - inner, shared, own[3] - near - inner + shared],
    ]
    matrix = torch.zeros(8, 8, dtype=torch.float64)
    for k in range(4):
        (first, second), sign = even[k], 1 if k % 2 == 0 else -1
        half = torch.tensor([first, second, sign * second, sign * first], dtype=torch.float64)
        matrix[2 * k] = torch.cat([half, half.flip(0)])
        half = torch.tensor(odd[k], dtype=torch.float64)
        matrix[2 * k + 1] = torch.cat([half, -half.flip(0)])
    return matrix.float().to(device)


@lru_cache(maxsize=32)
def _steps(quality: int, table: tuple[int, ...], device: torch.device) -> Tensor:
    """(8, 8) float32 steps of quantisation at a quality, 1 to 255."""
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality
    steps = torch.div(torch.tensor(table) * percent + 50, 100, rounding_mode="floor").clamp(1, 255)
    return steps.view(8, 8).float().to(device)
