"""Spatter: drops of water with shading at their rims, or mud. One of the four extra corruptions.

The shading of water goes through the edge detector, the distance transform and the histogram equalisation of OpenCV,
which are made here for a batch. Checked against OpenCV 4.11 by the reference's pictures (tests/corruptions).

Shapes: B images, H rows, W columns; layers are (B, 1, H, W) float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.data.corruptions.draws import Draws
from clplat.data.corruptions.linear import smooth

_WATER, _MUD = (175, 238, 238), (63, 42, 20)
_LOW, _HIGH = 50, 150  # thresholds of edges
_FARTHEST = 20.0
# Distances to the eight neighbours and, by a knight's move, to eight more: Borgefors, 1986, in units of 2⁻¹⁶.
_COSTS = {(0, 1): 1.0, (1, 1): 91750 / 65536, (1, 2): 143976 / 65536}
_AROUND = [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
_MOVES = {(y, x): _COSTS[k] for y, x in _AROUND if (k := (min(abs(y), abs(x)), max(abs(y), abs(x)))) in _COSTS}


def spatter(pixels: Tensor, constants: tuple[float, ...], draws: Draws) -> Tensor:
    """Pixels (B, 3, H, W) uint8 → float32 in grey levels / 255."""
    mean, deviation, sigma, threshold, strength, mud = constants
    height, width = pixels.shape[-2:]
    liquid = smooth(draws.normal(1, height, width) * deviation + mean, float(sigma))
    liquid = liquid.masked_fill(liquid < threshold, 0)
    image = pixels / 255
    colour = torch.tensor(_MUD if mud else _WATER, device=pixels.device).view(1, 3, 1, 1) / 255
    if mud:
        cover = smooth((liquid > threshold).float(), float(strength))
        cover = cover.masked_fill(cover < 0.8, 0)
        return image * (1 - cover) + colour * cover
    liquid = (liquid * 255).floor_() % 256
    light = liquid * _shading(liquid)
    light = light / light.amax((-2, -1), keepdim=True).clamp(min=1e-9)
    return image + light * strength * colour


def _shading(liquid: Tensor) -> Tensor:
    """How bright a drop is, by the distance from its rim; whole levels."""
    distance = _distance(edges(liquid)).clamp_(max=_FARTHEST)
    levels = equalised(_mean(distance).floor_())
    relief = torch.tensor([[-2.0, -1, 0], [-1, 1, 1], [0, 1, 2]], device=liquid.device)
    lit = F.conv2d(_framed(levels), relief[None, None]).clamp_(0, 255)
    return torch.round(_mean(lit))


def _framed(layer: Tensor) -> Tensor:
    """One more row and column on each side, mirrored about the edge pixel."""
    return F.pad(layer, (1, 1, 1, 1), mode="reflect")


def _mean(layer: Tensor) -> Tensor:
    """Mean of 3 × 3 pixels."""
    return F.avg_pool2d(_framed(layer), 3, stride=1)


def edges(layer: Tensor) -> Tensor:
    """Canny's edges of whole levels from 0 to 255, bool (B, 1, H, W); gradients are sums of absolute differences.

    Source: Canny, "A Computational Approach to Edge Detection", 1986; as OpenCV counts ties.
    """
    slope = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=layer.device)
    across, down = F.conv2d(F.pad(layer, (1, 1, 1, 1), mode="replicate"), torch.stack([slope, slope.T])[:, None]).split(
        1, dim=1
    )
    size = across.abs() + down.abs()
    height, width = size.shape[-2:]
    framed = F.pad(size, (1, 1, 1, 1))

    def beside(dy: int, dx: int) -> Tensor:
        return framed[..., 1 + dy : 1 + dy + height, 1 + dx : 1 + dx + width]

    steep = down.abs() * 32768
    flat_limit = across.abs() * 13573  # tan 22.5°
    flat, upright = steep < flat_limit, steep > flat_limit + across.abs() * 65536
    rising = (across < 0) != (down < 0)
    along = (size > beside(0, -1)) & (size >= beside(0, 1))
    above = (size > beside(-1, 0)) & (size >= beside(1, 0))
    diagonal = torch.where(
        rising,
        (size > beside(-1, 1)) & (size > beside(1, -1)),
        (size > beside(-1, -1)) & (size > beside(1, 1)),
    )
    ridge = (size > _LOW) & torch.where(flat, along, torch.where(upright, above, diagonal))
    found = ridge & (size > _HIGH)
    while True:  # weak ridges that touch an edge are edges
        grown = ridge & (F.max_pool2d(found.float(), 3, stride=1, padding=1) > 0)
        if torch.equal(grown, found):
            return found
        found = grown


def _distance(found: Tensor) -> Tensor:
    """Distance to the nearest edge in steps to neighbours, float32; beyond 20 some value of at least 20."""
    height, width = found.shape[-2:]
    distance = torch.where(found, 0.0, 2 * _FARTHEST)
    while True:
        framed = F.pad(distance, (2, 2, 2, 2), value=2 * _FARTHEST)
        nearer = distance
        for (dy, dx), cost in _MOVES.items():
            nearer = torch.minimum(nearer, framed[..., 2 + dy : 2 + dy + height, 2 + dx : 2 + dx + width] + cost)
        if torch.equal(nearer, distance):
            return distance
        distance = nearer


def equalised(layer: Tensor) -> Tensor:
    """Whole levels from 0 to 255, spread so that their shares grow evenly; an image of one level stays."""
    flat = layer.flatten(1).long()
    shares = torch.zeros(len(flat), 256, device=layer.device).scatter_add_(1, flat, torch.ones_like(flat).float())
    first = flat.amin(1, keepdim=True)
    least = shares.gather(1, first)
    others = flat.shape[1] - least
    table = torch.round((shares.cumsum(1) - least) * (255 / others.clamp(min=1)))
    table = torch.where(others > 0, table, first.float())
    return table.gather(1, flat).view_as(layer)
