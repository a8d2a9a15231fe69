"""LiNeS: what an experience changed is scaled down, the more the shallower the layer.

Source   Wang et al., "LiNeS: Post-training Layer Scaling Prevents Forgetting and Enhances Model Merging", ICLR 2025,
         arXiv:2410.17146.
Checked  by notes on the official code (wang-kee/LiNeS, MIT); the paper could not be read in full.
    θ ← θ_before + λ(l) (θ − θ_before),   λ(l) = α + β (l − 1) / (L − 1) for block l of L,   α outside the blocks
Differs  θ_before are the weights before the experience, the paper's the pretrained ones, so that changes add up over
         a stream. The head is left as learned (theirs are frozen). Blocks are the backbone's, where the code looks for
         numbers in names; each tower of CLIP counts by itself. A single block is the last one. α is not searched for.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from clplat.components.merging._base import Anchored, require
from clplat.strategy import Strategy


def factors(blocks: int, alpha: float, beta: float) -> list[float]:
    """λ(1), …, λ(L).

    >>> factors(3, 0.5, 0.5)
    [0.5, 0.75, 1.0]
    """
    return [alpha + beta * (l / (blocks - 1) if blocks > 1 else 1.0) for l in range(blocks)]


class LiNeS(Anchored):
    """Scales what shallow layers learned by α, and that of the last block by α + β, linearly between.

    Args:
        alpha: α in [0, 1]; 1 with beta 0 changes nothing.
        beta: β in [-α, 1 − α]; null takes 1 − α, which leaves the last block as learned.
    """

    paper = "arXiv:2410.17146"

    def __init__(self, *, alpha: float = 0.1, beta: float | None = None, **base: Any) -> None:
        super().__init__(**base)
        require("alpha", alpha, 0 <= alpha <= 1, "in [0, 1]")
        valid = "in [-alpha, 1 - alpha], or null"
        require("beta", beta, beta is None or -alpha <= beta <= 1 - alpha, valid)
        self.alpha, self.beta = alpha, 1 - alpha if beta is None else beta

    def faults(self, strategy: Strategy) -> list[str]:
        named: dict[int, set[int]] = {}  # parameter → blocks that it is in
        for number, block in enumerate(b for stack in stacks(strategy.model) for b in stack):
            for parameter in block.parameters():
                named.setdefault(id(parameter), set()).add(number)
        if not named:
            return ["merge: lines scales by depth, and this backbone has no blocks (valid: breadcrumbs, dynamic_ema)"]
        if any(len(where) > 1 for where in named.values()):
            return ["merge: lines scales by depth, and these blocks share weights (valid: breadcrumbs, dynamic_ema)"]
        return []

    def merged(self, strategy: Strategy, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        scale = dict.fromkeys(changes, self.alpha)
        model = strategy.model
        place = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        for stack in stacks(model):
            for block, factor in zip(stack, factors(len(stack), self.alpha, self.beta), strict=True):
                inside = {place[id(t)] for t in (*block.parameters(), *block.buffers())}
                scale |= dict.fromkeys(inside & changes.keys(), factor)
        return {name: scale[name] * change for name, change in changes.items()}


def stacks(model: Any) -> list[list[nn.Module]]:
    """The blocks of each of a model's towers, in order."""
    return model.backbone.stacks
