"""BN adapt: batch normalisation by the statistics of the test batch, or by a blend with those of the source.

Source   Nado et al., 2020, arXiv:2006.10963 (share 1); Schneider et al., "Improving robustness against common
         corruptions by covariate shift adaptation", NeurIPS 2020, arXiv:2006.16971, equation 2 (share = n / (N + n)).
    μ = (1 − a) μ_source + a μ_batch,  σ² = (1 − a) σ²_source + a σ²_batch        a = share
Differs  σ²_batch is the biased variance, by which torch normalises, so that share 1 is exactly the batch's own
         statistics; the reference of mariodoebler/test-time-adaptation takes the unbiased one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat import require
from clplat.errors import UserError
from clplat.strategies._tta import TTA


class BNAdapt(TTA):
    """Plain training in learn experiences; other statistics, and no gradient, in adapt experiences.

    Predictions at evaluation use the statistics of the evaluation batch in the same way.

    Args:
        share: a in [0, 1], of the batch; 0 is `source`. Small ones (0.1) are for small batches.
    """

    paper = "arXiv:2006.10963"
    searched = {"share": (0.0, 1.0)}

    def __init__(self, *, share: float = 1.0, **base: Any) -> None:
        super().__init__(**base)
        require("share", share, 0 <= share <= 1, "in [0, 1]")
        if self.norms == 0:
            raise UserError(
                "strategy: bn_adapt needs batch normalisation, which this backbone has not: it would be source"
            )
        self.share = share
        self.statistics = "batch" if share == 1 else "blend"  # type: ignore[misc]

    @torch.no_grad()
    def _adapt(self, x: Tensor) -> tuple[Tensor, None]:
        return self.model(x), None  # (B, C)
