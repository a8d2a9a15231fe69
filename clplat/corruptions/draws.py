"""Random numbers that belong to an image, not to a batch: a function of (key, position) alone.

So a corrupted image is the same whatever batch, order, process or device it is computed in, and nothing needs to be
saved for a resume. The generator is a counter-based hash of 32-bit words: two rounds of a multiply-xorshift finaliser
(constants of Wellons, "hash-prospector", public domain), the second keyed anew. Integer arithmetic only, so that the
bits are the same on every device. It is made for pictures, not for cryptography.

Shapes: B images of a batch, n numbers an image.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from math import prod

import torch
from torch import Tensor

_GOLDEN = -1640531527  # 2³² / φ, as a signed word
_FIRST, _SECOND = 0x21F0AAAD, 0x735A2D97
_LEVELS = 1 << 16


class Draws:
    """Numbers for each image of a batch, drawn one after the other.

    Args:
        indices: (B,) int64 number of each image in its data set.
        purpose: what the numbers are for: seed, corruption, severity; another purpose, other numbers.
    """

    def __init__(self, indices: Tensor, *purpose: object) -> None:
        salt = hashlib.sha256(repr(purpose).encode()).digest()
        base = int.from_bytes(salt[:8], "little", signed=True)
        key = _splitmix(indices.to(torch.int64) + base)
        self._keys = (_low(key), _low(key >> 32))
        self.device, self.count = indices.device, len(indices)
        self._used = 0

    def words(self, *shape: int) -> Tensor:
        """(B, *shape) int32, every value equally likely."""
        count, (first, second) = prod(shape), self._keys
        counter = torch.arange(self._used, self._used + count, dtype=torch.int32, device=first.device)
        self._used += count
        y = (counter * _GOLDEN)[None] ^ first[:, None]
        spare = torch.empty_like(y)
        _fold(y, 16, spare).mul_(_FIRST)
        _fold(y, 15, spare).add_(second[:, None]).mul_(_SECOND)
        return _fold(y, 15, spare).view(-1, *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B, *shape) float32 in [low, high], in steps of 2⁻²⁴ of the range."""
        unit = (self.words(*shape) >> 8).to(torch.float32)  # in [−2²³, 2²³)
        return unit.mul_((high - low) * 2.0**-24).add_((low + high) / 2 + (high - low) * 2.0**-25)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32 of mean 0 and variance 1: one of 65,536 equally likely quantiles, up to ±4.3."""
        count = prod(shape)
        words = self.words(-(-count // 2))
        halves = torch.cat([words & (_LEVELS - 1), (words >> 16) & (_LEVELS - 1)], dim=1)[:, :count]
        return _quantiles(words.device).index_select(0, halves.reshape(-1)).view(-1, *shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """(B, *shape) int64 in [low, high)."""
        unit = (self.words(*shape).to(torch.int64) & 0xFFFFFFFF) * (high - low)
        return (unit >> 32) + low


def _fold(y: Tensor, shift: int, spare: Tensor) -> Tensor:
    """y ← y xor (y >> shift), shifting zeros in."""
    torch.bitwise_right_shift(y, shift, out=spare)
    return y.bitwise_xor_(spare.bitwise_and_((1 << (32 - shift)) - 1))


def _low(key: Tensor) -> Tensor:
    """The lower 32 bits of int64 words, as signed int32."""
    return ((key & 0xFFFFFFFF) - ((key & 0x80000000) << 1)).to(torch.int32)


def _splitmix(z: Tensor) -> Tensor:
    """Finaliser of splitmix64 (Steele, Lea, Flood, OOPSLA 2014) on int64 words that wrap around."""
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        z = (z ^ ((z >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return z ^ ((z >> 31) & ((1 << 33) - 1))


@lru_cache(maxsize=8)
def _quantiles(device: torch.device) -> Tensor:
    """(65536,) float32: the middle quantile of each of as many equally likely slices, scaled to variance 1."""
    middle = (torch.arange(_LEVELS, dtype=torch.float64) + 0.5) / _LEVELS
    z = torch.special.ndtri(middle)
    return (z / z.square().mean().sqrt()).to(torch.float32).to(device)
