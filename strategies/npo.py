"""NPO: what is to be erased is the rejected answer of a preference without a preferred one.

Source   Zhang et al., "Negative Preference Optimization: From Catastrophic Collapse to Effective Unlearning", COLM
         2024, arXiv:2404.05868, equation 3; with α > 0 its NPO + RT.
Checked  against licong-lin/negative-preference-optimization TOFU/dataloader.py and locuslab/open-unlearning
         src/trainer/unlearn/npo.py.
    request: loss = − (2/β) · mean log σ( −β · log( p(y_f | x_f; θ) / p(y_f | x_f; θ_o) ) ) + α · mean ℓ(x_r, y_r; θ)
             p of a whole answer: the product over its tokens; θ_o the model before the request; ℓ as in `grad_diff`
Differs  as in `grad_diff`, its parent, which it becomes as β → 0 (there with the log-probability of whole answers).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from clplat import require
from clplat.components.losses import log_likelihood
from clplat.strategies.grad_diff import GradDiff
from clplat.strategy import losses as losses_of


class NPO(GradDiff):
    """Plain training; a request is answered by negative preference optimization. B samples to erase, B retained.

    Args:
        beta: β > 0: the larger, the sooner a sample whose probability has fallen is let go.
    """

    paper = "arXiv:2404.05868"
    unshardable = ""
    searched = {"beta": (0.03, 3.0, "log")}
    compares = True
    erasure = "approximate: the erased answers' probability is pushed below what it was; no guarantee beyond that"

    def __init__(self, *, beta: float = 0.1, **base):
        super().__init__(**base)
        require("beta", beta, beta > 0, "> 0")
        self.beta = beta

    def _forget(self, losses: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """−(2/β) log σ(−β log-ratio) (B,) of samples to erase, from their losses ℓ (B,)."""
        assert self.before is not None
        before = log_likelihood(self.model, losses_of(self.before.model, x, y), y)
        ratio = log_likelihood(self.model, losses, y) - before
        return -2 / self.beta * F.logsigmoid(-self.beta * ratio)
