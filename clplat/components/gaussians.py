"""A normal distribution of the features of each class, kept as sums.

    μ_c = 1/n_c Σ_{y=c} f,   Σ_c = 1/(n_c − 1) Σ_{y=c} (f − μ_c)(f − μ_c)ᵀ

Shapes: n rows of a batch, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.components.prototypes import Prototypes


class Gaussians(Prototypes):
    """Sums, and sums of products, of the features of each class, in float64: 8 D² bytes a class.

    Args:
        width: D.
    """

    squares: nn.Parameter  # (C, D, D) Σ f fᵀ; no buffer, which DDP by default sends to all processes in every pass

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self.squares = nn.Parameter(torch.zeros(0, width, width, dtype=torch.float64), requires_grad=False)

    def grow(self, classes: int) -> None:
        super().grow(classes)
        new = len(self.counts) - len(self.squares)
        if new > 0:
            self.squares = nn.Parameter(F.pad(self.squares, (0, 0, 0, 0, 0, new)), requires_grad=False)

    def add(self, features: Tensor, labels: Tensor) -> None:
        super().add(features, labels)
        for c in labels.unique().tolist():
            own = features[labels == c].double()
            self.squares[c] += own.T @ own

    def moments(self, c: int) -> tuple[Tensor, Tensor]:
        """μ_c (D,), and R (D, D) with R Rᵀ = Σ_c; R is 0 of a class of one sample."""
        n = int(self.counts[c])
        mean = self.totals[c] / n
        values, vectors = torch.linalg.eigh((self.squares[c] - n * torch.outer(mean, mean)) / max(n - 1, 1))
        return mean, vectors * values.clamp(min=0).sqrt()

    def _sums(self) -> Iterator[Tensor]:
        yield from super()._sums()
        yield self.squares
