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
_PIECE = 1 << 16  # words made at a time on a CPU


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
        counter *= _GOLDEN
        found = torch.empty(len(first), count, dtype=torch.int32, device=first.device)
        step = max(_PIECE // max(count, 1), 1) if first.device.type == "cpu" else max(len(first), 1)
        spare = torch.empty_like(found[:step])
        for start in range(0, len(first), step):  # pieces that a cache holds
            y = found[start : start + step]
            torch.bitwise_xor(counter, first[start : start + step, None], out=y)
            _fold(y, 16, spare).mul_(_FIRST)
            _fold(y, 15, spare).add_(second[start : start + step, None]).mul_(_SECOND)
            _fold(y, 15, spare)
        return found.view(-1, *shape)

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        """(B, *shape) float32 in [low, high], in steps of 2⁻²⁴ of the range."""
        unit = (self.words(*shape) >> 8).to(torch.float32)  # in [−2²³, 2²³)
        return unit.mul_((high - low) * 2.0**-24).add_((low + high) / 2 + (high - low) * 2.0**-25)

    def halves(self, *shape: int) -> Tensor:
        """(B, *shape) int16, every value equally likely: two from a word."""
        count = prod(shape)
        return self.words(-(-count // 2)).view(torch.int16)[:, :count].reshape(-1, *shape)

    def normal(self, *shape: int) -> Tensor:
        """(B, *shape) float32 of mean 0 and variance 1: one of 65,536 equally likely quantiles, up to ±4.3."""
        count = prod(shape)
        halves = self.halves(count).to(torch.int32).add_(_LEVELS // 2)
        return _quantiles(halves.device).index_select(0, halves.view(-1)).view(-1, *shape)

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        """(B, *shape) int32 in [low, high), a range of at most 2¹⁵; even to 2⁻¹⁶."""
        return (((self.halves(*shape).to(torch.int32) + _LEVELS // 2) * (high - low)) >> 16) + low


def _fold(y: Tensor, shift: int, spare: Tensor) -> Tensor:
    """y ← y xor (y >> shift), shifting zeros in."""
    shifted = torch.bitwise_right_shift(y, shift, out=spare[: len(y)])
    return y.bitwise_xor_(shifted.bitwise_and_((1 << (32 - shift)) - 1))


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
