"""SimpleCIL: the mean features of each class under a frozen backbone are the classifier; nothing is trained.

Source   Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity
         are All You Need", IJCV 2024, arXiv:2303.07338.
Checked  against zhoudw-zdw/RevisitingCIL models/simplecil.py (a2e6b71).
    p_c = 1/n_c Σ_{y=c} φ(x),   prediction argmax_c cos(φ(x), p_c)
Differs  sums in float64, over all samples of a class, wherever they come (the authors' code replaces the prototype of a
         class that comes again). No augmentation, and each sample once however many epochs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clplat.components.prototypes import Prototypes
from clplat.components.sums import Sums
from clplat.strategies._frozen import Summing


class SimpleCIL(Summing):
    """Prototypes of a frozen backbone, compared by cosine. Shapes: B samples, D features, C classes."""

    paper = "arXiv:2303.07338"
    unshardable = ""

    def __init__(self, **base):
        super().__init__(**base)
        backbone: Any = self.model.backbone
        self.prototypes = Prototypes(backbone.embed_dim)

    def _open(self) -> Sequence[Sums]:
        return [self.prototypes]

    def _take(self, features: Tensor, labels: Tensor) -> None:
        self.prototypes.add(features, labels)

    def readout(self, features: Tensor, task: int | None = None) -> Tensor:
        return self.prototypes(features)  # (B, C)

    def measurements(self) -> dict[str, float]:
        return {"samples": int(self.prototypes.counts.sum())}
