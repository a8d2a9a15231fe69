"""What an experience does to its inputs: a fixed, deterministic map of a whole batch (`Data.world`).

Shapes: B samples of a batch, C channels, H rows, W columns, D features of a flat sample.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class Permuted:
    """Puts pixels in another order, all channels alike; inputs (B, D) or (B, ..., H, W), any dtype.

    Args:
        order: (D,) or (H · W,) int64 permutation.
    """

    def __init__(self, order: Tensor) -> None:
        self.order = order

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.order.device != inputs.device:
            self.order = self.order.to(inputs.device)
        flat = inputs if inputs.ndim == 2 else inputs.flatten(-2)
        return flat.index_select(-1, self.order).view_as(inputs)


class Rotated:
    """Turns images counter-clockwise about their centre, bilinear, zeros outside; (B, C, H, W), dtype kept.

    Args:
        degrees: 0 leaves inputs as they are.
    """

    def __init__(self, degrees: float) -> None:
        self.degrees = degrees

    def __call__(self, inputs: Tensor) -> Tensor:
        if self.degrees % 360 == 0:
            return inputs
        height, width = inputs.shape[-2:]
        turn = np.deg2rad(self.degrees)
        cos, sin = float(np.cos(turn)), float(np.sin(turn))
        # The grid is in units of half the height and half the width.
        theta = torch.tensor(
            [[cos, -sin * height / width, 0.0], [sin * width / height, cos, 0.0]], device=inputs.device
        )
        grid = F.affine_grid(theta[None], [1, 1, height, width], align_corners=False)
        turned = F.grid_sample(inputs.to(torch.float32), grid.expand(len(inputs), -1, -1, -1), align_corners=False)
        return turned.round_().to(inputs.dtype) if inputs.dtype == torch.uint8 else turned.to(inputs.dtype)


def permutations(shape: tuple[int, ...], experiences: int, seed: int) -> list[tuple[str, Permuted | None]]:
    """Name and permutation of each experience for samples of `shape`; none (the identity) for the first."""
    pixels = shape[0] if len(shape) == 1 else shape[-2] * shape[-1]
    drawn = [generator(seed, "permuted", i).permutation(pixels) for i in range(1, experiences)]
    return [("permuted_0", None), *((f"permuted_{i}", Permuted(torch.from_numpy(p))) for i, p in enumerate(drawn, 1))]


def rotations(experiences: int, max_angle: float) -> list[tuple[str, Rotated]]:
    """Name and rotation of each experience, from 0 to `max_angle` degrees in even steps."""
    angles = np.linspace(0, max_angle, experiences).tolist()
    return [(f"rotated_{i}_{round(a)}deg", Rotated(a)) for i, a in enumerate(angles)]


def generator(seed: int, purpose: str, index: int = 0) -> np.random.Generator:
    """A generator for one purpose, and one experience, of a stream."""
    return np.random.default_rng([seed, index, *purpose.encode()])
