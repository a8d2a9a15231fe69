"""Corruptions of 256 images of 32 x 32 pixels: clplat's batch next to one image after the other.

Both on one thread, in seconds of the processor, so that a loaded machine does not count."""

from __future__ import annotations

import statistics
import time

import numpy as np
import torch

from benchmarks.corruptions_by_hand import BY_HAND
from benchmarks.timing import Row, paired
from clplat.data.corruptions import STANDARD, corrupt

IMAGES, SEVERITY = 256, 5
LIMIT = 0.1  # of all fifteen together
EXACT = ("zoom_blur", "brightness", "contrast", "pixelate", "jpeg_compression", "defocus_blur")


def rows(quick: bool = False) -> list[Row]:
    """A row for each corruption, for information, and one for all of them, with a limit; microseconds an image."""
    images = pictures(16 if quick else IMAGES)
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    found = {name: _measure(name, images, tensor, 2 if quick else 7) for name in STANDARD}
    note = f"an image; severity {SEVERITY}, batches of {len(images)}"
    every = [list(map(statistics.fmean, zip(*(side[k] for side in found.values()), strict=True))) for k in (0, 1)]
    table = [paired("all 15 corruptions", "µs", every[0], every[1], "ratio", None if quick else LIMIT, note)]
    return table + [paired(name, "µs", sides[0], sides[1], "ratio") for name, sides in found.items()]


def pictures(count: int, side: int = 32) -> np.ndarray:
    """(count, side, side, 3) uint8: smooth colours with some grain, as photographs have."""
    rng = np.random.default_rng(0)
    coarse = torch.from_numpy(rng.random((count, 3, 5, 5)))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bicubic").permute(0, 2, 3, 1).numpy()
    return ((smooth + 0.03 * rng.standard_normal(smooth.shape)).clip(0, 1) * 255).astype(np.uint8)


def _measure(name: str, images: np.ndarray, tensor: torch.Tensor, rounds: int) -> tuple[list[float], list[float]]:
    """Microseconds an image of both sides, round by round; by hand a part of the images stands for all."""
    rng, indices, sides = np.random.default_rng(0), torch.arange(len(images)), ([], [])  # type: ignore[var-annotated]
    some = images[:8] if name in ("glass_blur", "zoom_blur") else images[:64]
    made = corrupt(tensor, name, SEVERITY, indices=indices)
    by_hand = np.stack([BY_HAND[name](image, rng) for image in some])
    if name in EXACT:
        gap = np.abs(made[: len(some)].permute(0, 2, 3, 1).numpy().astype(int) - by_hand)
        assert gap.max() <= 1, name
    for _ in range(rounds):
        started = time.process_time()
        corrupt(tensor, name, SEVERITY, indices=indices)
        middle = time.process_time()
        for image in some:
            BY_HAND[name](image, rng)
        sides[0].append(1e6 * (middle - started) / len(images))
        sides[1].append(1e6 * (time.process_time() - middle) / len(some))
    return sides
