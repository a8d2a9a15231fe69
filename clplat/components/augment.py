"""Augmentations of images in [0, 1], N of them applied to a whole batch at once.

Source   Wang et al., "Continual Test-Time Domain Adaptation", CVPR 2022, arXiv:2203.13591; the transformations go back
         to KATANA, arXiv:2109.08191. Torchvision says what each one does to an image.
    clip; brightness, contrast, saturation, hue and gamma in random order; edge padding by half the side; rotation,
    translation, scale (bilinear); Gaussian blur; crop of the centre; mirror; Gaussian noise; clip
Shapes: N augmentations, B images, C channels (one or three), H and W their sides.

One augmentation is the same for all images of a batch, but for the noise. Nothing is padded or cropped: the padded
image outside the original is its border, so sampling the original with clamped coordinates at the pixels that the blur
needs gives the same; and a mirror after a symmetric blur is a mirror of where is sampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

# Factors of the colours in the order of their columns, and what else is drawn; uniform within these bounds.
COLOURS = {
    "brightness": (0.6, 1.4),
    "contrast": (0.7, 1.3),
    "saturation": (0.5, 1.5),
    "hue": (-0.06, 0.06),
    "gamma": (0.7, 1.3),
}
DEGREES, TRANSLATION, SCALE, SIGMA = (-15.0, 15.0), 1 / 16, (0.9, 1.1), (0.001, 0.5)
NOISE, MARGIN = 0.005, 2  # standard deviation; half the width of the blur's kernel
_CPU_IMAGES = 256  # in one pass: larger ones were slower
_GREY = (0.2989, 0.587, 0.114)


@dataclass
class Draws:
    """What N augmentations do.

    Args:
        order: (N, 5) int64, a permutation of the columns of `colours` in each row: the order they are applied in.
        colours: (N, 5) factors of brightness, contrast, saturation, hue (a shift, in turns) and gamma (a power).
        degrees: (N,) of rotation, clockwise.
        shift: (N, 2) whole pixels to the right and down.
        scale: (N,) enlargement.
        sigma: (N,) standard deviation of the blur in pixels.
        mirror: (N,) bool.
    """

    order: Tensor
    colours: Tensor
    degrees: Tensor
    shift: Tensor
    scale: Tensor
    sigma: Tensor
    mirror: Tensor

    def __len__(self) -> int:
        return len(self.degrees)

    def part(self, rows: slice) -> Draws:
        """Some of the augmentations."""
        return Draws(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})


def draw(count: int, height: int, width: int, generator: torch.Generator) -> Draws:
    """`count` augmentations of images of these sides, on the device of `generator`."""
    device = generator.device

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator, device=device)

    # Shares of the padded sides, which are twice the image's (for odd sides one pixel less).
    reach = TRANSLATION * torch.tensor([width + width // 2 * 2, height + height // 2 * 2], device=device)
    return Draws(
        order=torch.rand(count, 5, generator=generator, device=device).argsort(1),
        colours=torch.stack([uniform(low, high) for low, high in COLOURS.values()], 1),
        degrees=uniform(*DEGREES),
        shift=(uniform(-1, 1, 2) * reach).round(),
        scale=uniform(*SCALE),
        sigma=uniform(*SIGMA),
        mirror=uniform(0, 1) < 0.5,
    )


def augment(images: Tensor, draws: Draws, noise: Tensor | None = None) -> Tensor:
    """Augmented images (N · B, C, H, W) in [0, 1] of `images` (B, C, H, W): all of the first augmentation first.

    Args:
        noise: (N, B, C, H, W) standard normal numbers, or None for no noise.
    """
    if not images.numel():
        return images.repeat(len(draws), 1, 1, 1)
    batch = images.clamp(0, 1).expand(len(draws), *images.shape)
    batch = _blur(_affine(_jitter(batch, draws), draws), draws.sigma)
    if noise is not None:
        batch = torch.add(batch, noise, alpha=NOISE)
    return batch.clamp(0, 1).flatten(0, 1)


def in_turns(
    images: Tensor, draws: Draws, generator: torch.Generator, at_once: int | None, sharing: tuple[int, int, int]
) -> Iterator[Tensor]:
    """Augmented images (n, B, C, H, W) of some augmentations at a time, with noise from `generator`.

    The noise is drawn for the whole batch, one augmentation after the other: it depends neither on the number of
    processes nor on what is run at once.

    Args:
        at_once: n · B is about this; None is all at once, on a CPU what its caches take.
        sharing: images of the batch over all processes, rank, number of processes.
    """
    whole, rank, world_size = sharing
    share = -(-whole // world_size)
    at_once = at_once or (_CPU_IMAGES if images.device.type == "cpu" else len(draws) * share)
    size, rows = (whole, *images.shape[1:]), torch.arange(whole, device=images.device).tensor_split(world_size)[rank]
    for turn in torch.arange(len(draws)).split(max(at_once // share, 1)):
        part = draws.part(slice(int(turn[0]), int(turn[-1]) + 1))
        drawn = [torch.randn(size, generator=generator, dtype=images.dtype, device=images.device) for _ in turn]
        noise = torch.stack([d if world_size == 1 else d[rows] for d in drawn])
        yield augment(images, part, noise).unflatten(0, (len(part), len(images)))


# --- colours ----------------------------------------------------------------------------------------------------------


def _jitter(batch: Tensor, draws: Draws) -> Tensor:
    """Each row of (N, B, C, H, W) through the five changes of colour in its own order."""
    changes = (_brightness, _contrast, _saturation, _hue, _gamma)
    batch = batch.contiguous()
    for turn in draws.order.T.cpu():  # (N,) which change is whose turn
        for number, change in enumerate(changes):
            rows = (turn == number).nonzero()[:, 0].to(batch.device)
            if len(rows):
                factors = draws.colours[rows, number].to(batch.dtype).view(-1, 1, 1, 1, 1)
                batch[rows] = change(batch[rows], factors)
    return batch


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp_(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    mean = _grey(x).mean((-3, -2, -1), keepdim=True)  # of each image
    return (x * factor + mean * (1 - factor)).clamp_(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return x if x.shape[2] == 1 else (x * factor + _grey(x) * (1 - factor)).clamp_(0, 1)


def _hue(x: Tensor, turns: Tensor) -> Tensor:
    """In the HSV hexagon, with value and saturation kept."""
    if x.shape[2] == 1:
        return x
    high, low = x.amax(2, keepdim=True), x.amin(2, keepdim=True)
    spread = high - low
    r, g, b = x.split(1, 2)
    sixth = torch.where(spread > 0, spread, 1.0)
    hue = torch.where(high == r, (g - b) / sixth, torch.where(high == g, 2 + (b - r) / sixth, 4 + (r - g) / sixth))
    start = torch.tensor([5.0, 3.0, 1.0], dtype=x.dtype, device=x.device).view(3, 1, 1)
    k = (start + hue + 6 * turns).remainder_(6)  # (N, B, 3, H, W)
    return high - spread * torch.minimum(k, 4 - k).clamp_(0, 1)


def _gamma(x: Tensor, power: Tensor) -> Tensor:
    return x.clamp(1e-8, 1).pow(power).clamp_(0, 1)


def _grey(x: Tensor) -> Tensor:
    """(..., 1, H, W) of (..., C, H, W)."""
    if x.shape[-3] == 1:
        return x
    r, g, b = x.split(1, -3)
    return _GREY[0] * r + _GREY[1] * g + _GREY[2] * b


# --- shape ------------------------------------------------------------------------------------------------------------


def _affine(batch: Tensor, draws: Draws) -> Tensor:
    """(N, B, C, H + 2 · MARGIN, W + 2 · MARGIN): rotated, moved, scaled and mirrored about the centre."""
    count, images, channels, height, width = batch.shape
    grid = _grid(draws, height, width).to(batch.dtype)
    flat = batch.reshape(count, images * channels, height, width)  # one grid serves all images of an augmentation
    sampled = F.grid_sample(flat, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return sampled.view(count, images, channels, height + 2 * MARGIN, width + 2 * MARGIN)


def _grid(draws: Draws, height: int, width: int) -> Tensor:
    """Where each pixel comes from, (N, H + 2 · MARGIN, W + 2 · MARGIN, 2) in the coordinates of `grid_sample`."""
    device = draws.degrees.device
    # The centre that torchvision crops lies half a pixel off the middle of an odd side.
    x = torch.arange(width + 2 * MARGIN, device=device) - (width - 1) / 2 - MARGIN
    y = torch.arange(height + 2 * MARGIN, device=device) - (height - 1) / 2 - MARGIN
    x = torch.where(draws.mirror[:, None], -x, x)  # (N, W')
    right = (x - draws.shift[:, :1])[:, None, :] / draws.scale[:, None, None]
    down = (y - draws.shift[:, 1:])[:, :, None] / draws.scale[:, None, None]
    angle = (draws.degrees * (math.pi / 180))[:, None, None]
    cos, sin = angle.cos(), angle.sin()
    columns, rows = cos * right + sin * down, cos * down - sin * right  # (N, H', W'), pixels from the middle
    return torch.stack([columns * (2 / width), rows * (2 / height)], 3)


def _blur(batch: Tensor, sigma: Tensor) -> Tensor:
    """Gaussian of five taps a side on (N, B, C, H', W'), of which the margin is used up."""
    offsets = torch.arange(-MARGIN, MARGIN + 1, device=batch.device)
    taps = torch.exp(-0.5 * (offsets / sigma[:, None]) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).to(batch.dtype).view(len(sigma), -1, 1, 1, 1, 1)  # (N, 5, 1, 1, 1, 1)
    for dim in (3, 4):
        size = batch.shape[dim] - 2 * MARGIN
        out = batch.narrow(dim, MARGIN, size) * taps[:, MARGIN]
        for k in range(2 * MARGIN + 1):
            if k != MARGIN:
                out.addcmul_(batch.narrow(dim, k, size), taps[:, k])
        batch = out
    return batch
