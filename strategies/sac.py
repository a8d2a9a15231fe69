"""SAC: soft actor-critic, and the plain way through a sequence of environments.

Source   Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", 2018, arXiv:1812.05905.
Checked  against stable-baselines3 2.9.2 sac.py (MIT): one update from equal weights.
    y = r + γ (1 − terminated) (min_i Q̄_i(s', a') − α log π(a'|s'))          a' ~ π(·|s')
    critics        mean over i and batch of (Q_i(s, a) − y)²;  then  Q̄ ← Q̄ + polyak (Q − Q̄)
    actor          E[α log π(ã|s) − min_i Q_i(s, ã)]                           ã ~ π(·|s)
    temperature    α (−E log π(ã|s) − H̄),  α = softplus(ρ)
Differs  α is a softplus of its parameter, not an exponential. Over several environments the networks and the optimizer
         go on, and the memory starts empty: fine-tuning (naive); `keep_memory` makes it experience replay (er), and
         `ewc_penalty` elastic weight consolidation of the policy (ewc; see `_environments.py`). A data set before
         the environment is learned from by the same losses, all networks at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat import require
from clplat.components.reinforcement import actor_loss, critic_loss, td_target, temperature_loss
from clplat.data.transitions import Transitions, unpack
from clplat.strategies._agent import OffPolicy


class SAC(OffPolicy):
    """Soft actor-critic. B transitions, N critics, M of them in a target, K actions for each state.

    Args:
        updates: U ≥ 1, critic steps for each step in the environment; one step of actor and temperature follows them.
        random_steps: so many first steps in each environment take uniform actions, and nothing is learned, ≥ 0.
        target_entropy: H̄; null is −a.
        target_members: M, critics that a target is the least of, drawn anew each time; null takes all.
        entropy_backup: whether targets count the entropy of what follows.
        max_backup: K ≥ 1, actions drawn at s'; the best one's value counts.
    """

    paper = "arXiv:1812.05905"

    def __init__(
        self, *, updates: int = 1, random_steps: int = 0, target_entropy: float | None = None,
        target_members: int | None = None, entropy_backup: bool = True, max_backup: int = 1, **base,
    ):  # fmt: skip
        super().__init__(**base)
        require("updates", updates, updates >= 1, "≥ 1")
        require("random_steps", random_steps, random_steps >= 0, "≥ 0")
        most = self.model.critics
        valid = target_members is None or 1 <= target_members <= most
        require("target_members", target_members, valid, f"1 to {most}, the critics of the backbone")
        require("max_backup", max_backup, max_backup >= 1, "≥ 1")
        self.updates, self.random_steps, self.target_members = updates, random_steps, target_members
        self.target_entropy = -float(self.model.actions) if target_entropy is None else target_entropy
        self.entropy_backup, self.max_backup = entropy_backup, max_backup
        self._drawn: Any = None  # rows (U · B, w) of the updates under way

    def act(self, observation: Any, explore: bool) -> np.ndarray:
        action = super().act(observation, explore)
        if explore and self.observed < self.random_steps:
            return (2 * torch.rand(action.shape) - 1).numpy()
        return action

    def _waits(self) -> int:
        return max(self.random_steps, super()._waits())

    def _steps(self) -> int:
        return self.updates + 1

    def training_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> Tensor:
        if batch is not None:
            return self._loss(self._scaled(unpack(batch[0], self.model.actions)))
        if batch_idx == 0:
            self._drawn = self._scaled(unpack(self._draw(self.updates), self.model.actions))
        part = slice(batch_idx * self.batch, (batch_idx + 1) * self.batch)
        self._critics_moved = batch_idx < self.updates
        if self._critics_moved:
            return self._critic_loss(Transitions(*(t[part] for t in self._drawn)))
        return self._actor_loss(self._drawn)

    def _loss(self, t: Transitions) -> Tensor:
        """Everything at once, all from the weights before the step."""
        self._critics_moved = True
        return self._critic_loss(t) + self._actor_loss(t)

    def _critic_loss(self, t: Transitions) -> Tensor:
        return critic_loss(self.model.q(self.model.encode(t.observation), t.action), self._target(t))

    @torch.no_grad()
    def _target(self, t: Transitions) -> Tensor:
        """y (B,)."""
        draws = self._backup_draws() if self._backup_draws() > 1 else None
        action, log_prob = self.model.sample(self.model.encode(t.next_observation), draws)  # (B[, K], a), (B[, K])
        encoded = self.model.encode(t.next_observation, target=True)
        value = self.model.q(encoded, action, members=self._members(), target=True).amin(0)
        if self.entropy_backup:
            value = value - self.model.temperature * log_prob
        return td_target(t.reward, t.terminated, value if draws is None else value.amax(1), self.gamma)

    def _backup_draws(self) -> int:
        """K."""
        return self.max_backup

    def _members(self) -> Tensor | None:
        """M indices of critics, which may repeat; None: all."""
        return None if self.target_members is None else torch.randint(self.model.critics, (self.target_members,))

    def _pool(self, q: Tensor) -> Tensor:
        """Of the critics' values (N, B), what the actor climbs, (B,)."""
        return q.amin(0)

    def _actor_loss(self, t: Transitions) -> Tensor:
        """Of the policy, and of the temperature."""
        encoded = self.model.encode(t.observation).detach()
        action, log_prob = self.model.sample(encoded)
        temperature = self.model.temperature
        loss = actor_loss(log_prob, self._pool(self.model.q(encoded, action, frozen=True)), temperature)
        return self._held(loss) + temperature_loss(temperature, log_prob, self.target_entropy)

    @torch.no_grad()
    def probe(self, transitions: Transitions) -> dict[str, Tensor]:
        """Mean of the critics and its distance from a target, both (n,), from one draw that no generator notices."""
        t = self._scaled(transitions)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            q, target = self.model.q(self.model.encode(t.observation), t.action).mean(0), self._target(t)
        return {"q": q, "td_error": (q - target).abs()}
