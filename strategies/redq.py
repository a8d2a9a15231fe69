"""REDQ: many critics, targets from a random few of them, and many updates for each step in the environment.

Source   Chen et al., "Randomized Ensembled Double Q-Learning", ICLR 2021, arXiv:2101.05982.
    y = r + γ (1 − terminated) (min_{i ∈ subset} Q̄_i(s', a') − α log π(a'|s'))      M of N critics, without replacement
    U critic steps for each step in the environment, then one of the actor: E[α log π(ã|s) − mean_i Q_i(s, ã)]
Differs  layer norm is the backbone's (`layer_norm: false` is the paper's). The actor's step takes all U batches.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.strategies.sac import SAC


class REDQ(SAC):
    """Randomised ensembled double Q-learning; the backbone holds the N critics (10 in the paper).

    Args:
        updates: U ≥ 1, critic steps for each step in the environment.
        target_members: M, critics that a target is the least of, drawn anew each time; null takes all.
    """

    paper = "arXiv:2101.05982"

    def __init__(self, *, updates: int = 20, target_members: int | None = 2, **base):
        super().__init__(updates=updates, target_members=target_members, **base)

    def _members(self) -> Tensor | None:
        return None if self.target_members is None else torch.randperm(self.model.critics)[: self.target_members]

    def _pool(self, q: Tensor) -> Tensor:
        return q.mean(0)
