"""L2P: a pool of prompts shared by all tasks, of which each sample takes those whose keys are nearest to its query.

Source   Wang et al., "Learning to Prompt for Continual Learning", CVPR 2022, arXiv:2112.08654, equations 2 to 5.
Checked  against GT-RIPL/CODA-Prompt models/zoo.py (6417d4f), "L2P++", whose form of prompts this is.
    S(x) = the N indices s of largest cos(q(x), k_s);   prefix [P_s]_{s ∈ S(x)}
    loss = CE over the experience's classes + λ Σ_{s ∈ S(x)} (1 − cos(q(x), k_s))
Differs  prompts are keys and values of the first blocks' attention, and the head reads the features, as in L2P++ (the
         paper has tokens before the input, and the mean of what becomes of them). Each sample chooses by itself, in
         evaluation too (the paper's code: a batch together), and draws the keys it chose alone (L2P++ draws each chosen
         key to all queries of the batch, and sums). Nothing penalises prompts that are chosen often.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from clplat import require
from clplat.adapters.prefixes import Prefix
from clplat.strategies._prompted import Prompted, by_block, cosines, uniform


class L2P(Prompted):
    """A pool of prompts.

    Args:
        blocks: L ≥ 1, of the backbone, from the first, that get prompts.
        pool: prompts that there are, ≥ 1.
        chosen: N, of which a sample takes, 1 to `pool`.
        length: n ≥ 1, keys and as many values of a prompt in a block.
        pull: λ > 0, weight of the loss that draws keys to their queries, which nothing else depends on.
    """

    paper = "arXiv:2112.08654"
    unshardable = ""
    searched = {"pull": None}

    def __init__(self, *, blocks: int = 1, pool: int = 10, chosen: int = 5, length: int = 5, pull: float = 0.5, **base):
        super().__init__(**base)
        require("pool", pool, pool >= 1, "≥ 1")
        require("chosen", chosen, 1 <= chosen <= pool, f"1 to {pool}, the pool")
        require("length", length, length >= 1, "≥ 1")
        require("pull", pull, pull > 0, "> 0")
        self.chosen, self.pull = chosen, pull
        self.prompts, self.keys = uniform(pool, blocks, 2, length, self.width), uniform(pool, self.width)
        self._prefix(blocks)

    def _prefixes_for(self, query: Tensor) -> Sequence[Prefix]:
        likeness, nearest = cosines(query, self.keys).topk(self.chosen, dim=1)  # (B, N) both
        if self.training:
            self._away = self.pull * (1 - likeness).sum(1)
        found = self.prompts[nearest].movedim(1, 3)  # (B, L, 2, N, n, D)
        return by_block(found.flatten(3, 4))
