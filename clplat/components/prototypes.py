"""Class prototypes: the mean feature of each class, and the cosines of features with them.

    p_c = 1/n_c Σ_{y=c} f(x),   cos(f, p_c) = fᵀ p_c / (‖f‖ ‖p_c‖)

Sums and counts are kept, so that prototypes do not depend on batches, their order or the number of processes; a class
that comes again adds to its own.

Shapes: n rows of a batch, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from clplat.components.sums import Sums


class Prototypes(Sums):
    """Sums of the features of each class, in float64. A class without a sample has the cosine −inf.

    Args:
        width: D.
    """

    totals: Tensor
    counts: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("totals", torch.zeros(0, width, dtype=torch.float64))  # (C, D) Σ f
        self.register_buffer("counts", torch.zeros(0, dtype=torch.int64))  # (C,)

    def grow(self, classes: int) -> None:
        new = classes - len(self.counts)
        if new > 0:
            self.totals, self.counts = F.pad(self.totals, (0, 0, 0, new)), F.pad(self.counts, (0, new))

    def add(self, features: Tensor, labels: Tensor) -> None:
        """Add samples of this process: features (n, D), labels (n,) int64."""
        self.totals.index_add_(0, labels, features.double())
        self.counts += torch.bincount(labels, minlength=len(self.counts))

    def forward(self, features: Tensor) -> Tensor:
        """Cosines (n, C) of features (n, D) and prototypes, float64; a sum has the direction of its mean."""
        cosines = F.normalize(features.double(), dim=1) @ F.normalize(self.totals, dim=1).T
        return cosines.masked_fill(self.counts == 0, -torch.inf)

    def _sums(self) -> Iterator[Tensor]:
        yield from (self.totals, self.counts)
