"""ACIL: a frozen backbone, a fixed random expansion, and a head solved for in closed form from sums.

Source   Zhuang et al., "ACIL", NeurIPS 2022, arXiv:2205.14922; batches of any mix of classes: Zhuang et al., "G-ACIL",
         NeurIPS 2024, arXiv:2403.15706.
Checked  against ZHUANGHP/Analytic-continual-learning (MIT, 0afd6bf): see experiments/acu/README.md.
    h = relu(φ(x) E),   A = Σ h hᵀ,   B = Σ h yᵀ,   W = (A + γI)⁻¹ B,   prediction argmax_j (h W)_j
Differs  A and B are kept instead of (A + γI)⁻¹, which the recursion of theirs updates: the same W, whatever the batches
         and their order. The backbone comes as it is (theirs is first trained on the first half of the classes): give
         pretrained weights, or a run's by `start.run`. No augmentation, and each sample once however many epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clplat.components.frozen import in_chunks
from clplat.components.ridge import Ridge
from clplat.components.sums import Sums
from clplat.strategies._frozen import Summing


class ACIL(Summing):
    """Analytic class-incremental learning. Shapes: B samples of a batch, k features, d expanded, C classes.

    Args:
        width: d, ≥ 1. A takes 8 d² bytes and a Cholesky factor of it d³/3 operations after each experience; the paper
            has 8192 for CIFAR-100 and 16384 for ImageNet.
        gamma: γ > 0, weight of ‖W‖² beside the sum (not the mean) of squared errors.
        bits: h is rounded to multiples of 2^-bits, 0..26, which makes the sums A and B exact; null does not round.
    """

    paper = "arXiv:2205.14922"
    unshardable = ""
    searched = {"gamma": (1e-3, 100.0, "log")}
    expansion: Tensor

    def __init__(self, *, width: int = 1024, gamma: float = 0.1, bits: int | None = None, **base):
        super().__init__(**base)
        self.ridge = Ridge(width, gamma, bits=bits)
        backbone: Any = self.model.backbone
        features: int = backbone.embed_dim
        expansion = torch.empty(features, width, dtype=torch.float64)
        self.register_buffer("expansion", expansion.uniform_(-1, 1) / features**0.5)  # E (k, d)

    def _open(self) -> Sequence[Sums]:
        return [self.ridge]

    def _take(self, features: Tensor, labels: Tensor) -> None:
        self.ridge.add(self._expanded(features), labels)

    def _solve(self) -> None:
        self.ridge.solve()

    def readout(self, features: Tensor, task: int | None = None) -> Tensor:
        return self.ridge(self._expand(features))  # (B, C)

    def measurements(self) -> dict[str, float]:
        return {"samples": int(self.ridge.counts.sum()), "condition_bound": self.ridge.condition_bound()}

    def _expand(self, features: Tensor) -> Tensor:
        """h (B, d) of features (B, k), as it enters the sums."""
        return self.ridge.rounded(torch.relu_(features.double() @ self.expansion))

    def _expanded(self, features: Tensor) -> Tensor:
        """The same, always by so many rows at a time, so that it does not depend on the batch."""
        return in_chunks(self._expand, features, self.chunk)
