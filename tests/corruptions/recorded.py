"""The reference's random numbers, drawn again from NumPy's legacy generator and put where `Draws` gives its own."""

from __future__ import annotations

import numpy as np
import torch
from corruptions.make_reference import SEED
from torch import Tensor


class Recorded:
    """Draws for one image, in the order in which the reference asks NumPy for them."""

    def __init__(self) -> None:
        self._rng = np.random.RandomState(SEED)
        self.device, self.count = torch.device("cpu"), 1

    def normal(self, *shape: int) -> Tensor:
        """Channels come last in the reference."""
        last = shape[1:] + shape[:1] if len(shape) == 3 else shape
        drawn = torch.from_numpy(self._rng.normal(size=last)).float()
        return (drawn.permute(2, 0, 1) if len(shape) == 3 else drawn)[None]

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        if shape == (2, 1):  # where a piece of frost starts; filled in by `integers`
            return torch.tensor(self._starts, dtype=torch.float64).view(1, 2, 1)
        return torch.from_numpy(self._rng.uniform(low, high, shape)).float()[None]

    def integers(self, low: int, high: int, *shape: int) -> Tensor:
        return torch.from_numpy(self._rng.randint(low, high, shape))[None]

    def frost(self, sides: list[tuple[int, int]], side: int) -> None:
        """Draw what frost needs in the reference's order: which picture, where its piece starts."""
        state = self._rng.get_state()
        which = self._rng.randint(5)
        starts = [self._rng.randint(0, n - side) for n in sides[which]]
        self._starts = [(k + 0.5) / (n - side) for k, n in zip(starts, sides[which], strict=True)]
        self._rng.set_state(state)
