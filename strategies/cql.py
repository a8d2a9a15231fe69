"""CQL: critics that are pessimistic about actions which the data do not hold.

Source   Kumar et al., "Conservative Q-Learning for Offline RL", NeurIPS 2020, arXiv:2006.04779, CQL(H).
    critics        mean (Q_i(s, a) − y)² + w · mean_{s, i} (log Σ_k exp(Q_i(s, a_k) − log density(a_k)) − Q_i(s, a))
                   a_k: n uniform ones, n of π(·|s), n of π(·|s'), all scored at s
                   y = r + γ (1 − terminated) max_k min_i Q̄_i(s', a'_k),  no entropy
    w              `penalty`; or softplus(λ), and τ taken off the gap: λ rises while the gap is above τ = `target_gap`
    actor, temperature   as SAC
Differs  all networks step at once, from the weights before the step. The penalty falls on critics drawn for it
         (`target_members`), as in WSRL's code. In an environment the same losses go on, with the memory for data.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat import require
from clplat.components.reinforcement import critic_loss, multiplier_loss, pessimism
from clplat.data.transitions import Transitions
from clplat.strategies._agent import OffPolicy
from clplat.strategies.sac import SAC


class CQL(SAC):
    """Conservative Q-learning. B transitions, M critics penalised of N, K = 3 n actions.

    Args:
        penalty: w ≥ 0, weight of the gap; 0 is SAC on the data. Not used where `target_gap` is given.
        target_gap: τ that softplus(λ), 1 at first, holds the gap at; null: the weight is `penalty`.
        penalty_actions: n ≥ 1, actions from each of three sources.
        importance: take the logarithm of the density that an action was drawn with off its value; else the data's own
            action joins the others.
        entropy_backup: whether targets count the entropy of what follows.
        max_backup: actions drawn at s', ≥ 1; the best one's value counts.
        updates: U ≥ 1, steps for each step in an environment.
    """

    paper = "arXiv:2006.04779"
    searched = {"penalty": (0.5, 20.0, "log")}

    def __init__(
        self, *, penalty: float = 5.0, target_gap: float | None = None, penalty_actions: int = 10,
        importance: bool = True, entropy_backup: bool = False, max_backup: int = 10, updates: int = 1, **base,
    ):  # fmt: skip
        super().__init__(entropy_backup=entropy_backup, max_backup=max_backup, updates=updates, **base)
        require("penalty", penalty, penalty >= 0, "≥ 0")
        require("penalty_actions", penalty_actions, penalty_actions >= 1, "≥ 1")
        self.penalty, self.target_gap = penalty, target_gap
        self.penalty_actions, self.importance = penalty_actions, importance
        self.multiplier = None if target_gap is None else nn.Parameter(torch.tensor(math.log(math.e - 1)))  # λ

    def _more_parameters(self) -> list[nn.Parameter]:
        return [] if self.multiplier is None else [self.multiplier]

    def _steps(self) -> int:
        return self.updates

    def training_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> Tensor:
        return OffPolicy.training_step(self, batch, batch_idx)

    def _critic_loss(self, t: Transitions) -> Tensor:
        encoded = self.model.encode(t.observation)
        q = self.model.q(encoded, t.action)  # (N, B)
        loss, gap = critic_loss(q, self._target(t)), self._gap(t, encoded, q)
        if self.multiplier is None or self.target_gap is None:
            return loss + self.penalty * gap
        weight = F.softplus(self.multiplier).detach()
        return loss + weight * (gap - self.target_gap) + multiplier_loss(self.multiplier, gap, self.target_gap)

    def _gap(self, t: Transitions, encoded: Tensor, q: Tensor) -> Tensor:
        """Mean over states and the penalised critics; encoded (B, d), q (N, B) of the data's actions."""
        n, a, members = self.penalty_actions, self.model.actions, self._members()
        with torch.no_grad():
            uniform = 2 * torch.rand(len(q.T), n, a, device=q.device) - 1
            here, log_here = self.model.sample(encoded, n)  # (B, n, a), (B, n)
            there, log_there = self.model.sample(self.model.encode(t.next_observation), n)
            log_density = torch.cat([torch.full_like(log_here, -a * math.log(2)), log_here, log_there], 1)
        values = self.model.q(encoded, torch.cat([uniform, here, there], 1), members=members)  # (M, B, 3 n)
        values = torch.cat([values[..., :n], self._calibrated(values[..., n:], t)], -1)
        own = q if members is None else q[members]
        return pessimism(own, values, log_density if self.importance else None).mean()

    def _calibrated(self, values: Tensor, t: Transitions) -> Tensor:
        """Values (M, B, 2 n) of the policy's actions as the penalty sees them."""
        return values
