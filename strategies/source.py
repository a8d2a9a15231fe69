"""Source: the trained model as it is, which adapts to nothing; what test-time adaptation has to beat.

Source   as "source" in Wang et al., "Tent", ICLR 2021, arXiv:2006.10726.
    ŷ = argmax f(x; θ_0)      θ_0 as trained, statistics of the source
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.strategies._tta import TTA


class Source(TTA):
    """Plain training in learn experiences; running statistics and no change in adapt experiences."""

    paper = "arXiv:2006.10726"
    statistics = "source"

    @torch.no_grad()
    def _adapt(self, x: Tensor) -> tuple[Tensor, None]:
        return self.model(x), None  # (B, C)
