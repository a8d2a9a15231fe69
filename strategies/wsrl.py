"""WSRL: from offline data to an environment without keeping the data, by a warm-up with the frozen policy.

Source   Zhou, Peng, Li, Levine, Kumar, "Efficient Online RL Fine-Tuning Need Not Retain Offline Data", ICLR 2025,
         arXiv:2412.07762.
    offline        Cal-QL or CQL with N critics, M of them in a target and in the penalty
    switch         networks, slow copies, temperature and optimizer go on; data and penalty do not; the memory is empty
    warm-up        K steps act by the policy's samples and are stored; nothing is learned
    online         for each step, U critic steps on (Q_i − y)², Q̄ after each, then one step of actor and temperature on
                   all U batches;  y = r + γ (1 − terminated) min_{i ∈ subset} Q̄_i(s', a'), without entropy
Differs  no step is taken by networks that are not learning (theirs get a zero gradient, which Adam's momentum follows).
         Updates begin after K steps, not K + 1. Indices of a subset may repeat, as theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from clplat import Experience, UserError, require
from clplat.data.transitions import Transitions
from clplat.strategies.cal_ql import CalQL
from clplat.strategies.sac import SAC

CHANCE = 0.1  # normalised return, where an expert's is known, up to which a policy is no better than a random one


class WSRL(CalQL):
    """Warm-start reinforcement learning; the backbone holds the N critics (10 in the paper).

    Args:
        offline: how the data are learned from; cql where returns to go say little (locomotion in the paper).
        warmup_steps: K ≥ 0; updates wait for one batch in any case.
        warmup_actions: policy samples the frozen policy; random is a control.
        updates: U ≥ 1, critic steps for each step in the environment.
        target_members: M, critics in a target, drawn anew each time; null takes all.
        online_max_backup: as `max_backup`, for the targets after the switch.
        memory: transitions kept of the environment, ≥ 1.
    """

    paper = "arXiv:2412.07762"
    data_access = "offline data until the first step in the environment, then its transitions alone"

    def __init__(
        self, *, offline: Literal["cal_ql", "cql"] = "cal_ql", warmup_steps: int = 5000,
        warmup_actions: Literal["policy", "random"] = "policy", updates: int = 4, target_members: int | None = 2,
        online_max_backup: int = 1, memory: int = 2_000_000, **base,
    ):  # fmt: skip
        super().__init__(updates=updates, target_members=target_members, memory=memory, **base)
        require("offline", offline, offline in ("cal_ql", "cql"), "cal_ql, cql")
        require("warmup_steps", warmup_steps, warmup_steps >= 0, "≥ 0")
        require("warmup_actions", warmup_actions, warmup_actions in ("policy", "random"), "policy, random")
        require("online_max_backup", online_max_backup, online_max_backup >= 1, "≥ 1")
        self.offline, self.warmup_steps, self.warmup_actions = offline, warmup_steps, warmup_actions
        self.online_max_backup = online_max_backup
        self.started = 0  # 1: the start run was the offline phase
        self.learned_offline = 0  # steps of it

    def before_start(self, weights: dict[str, Tensor]) -> None:
        self.started = self.learned_offline = 1

    def faults(self, experiences: Sequence[Experience], started: bool) -> list[str]:
        without = None if started else self._without_data(experiences)
        if without is None:
            return []
        anew = ", which it begins anew (strategy.restart)" if self.restart else ""
        return [
            f"strategy: WSRL has nothing to start from in {without}{anew}: no offline data, and no experience or "
            "start.run before it (valid: offline data in the stream, or start.run; without either, sac or redq)"
        ]

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        if self.restart:
            self.learned_offline = self.started

    def handover(self, experience: Experience, score: float, chance: float | None) -> list[str]:
        """Before the first step in the environment: what makes a warm start none."""
        if not self.learned_offline and experience.train is not None:
            raise UserError(
                "loop.max_epochs, loop.max_steps: no step was taken on the offline data, so WSRL has nothing to start "
                "from (valid: at least one)"
            )
        if chance is None:
            return []
        best = experience.return_bounds[1] if experience.return_bounds else chance
        if score > chance + CHANCE * (best - chance):
            return []
        return [
            f"the offline policy returns {score:.4g} in {experience.name}, hardly more than random actions "
            f"({chance:.4g}): warm-up will fill the memory with bad data (train longer offline)"
        ]

    def training_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> Tensor:
        if batch is None:
            return SAC.training_step(self, None, batch_idx)
        self.learned_offline += 1
        return super().training_step(batch, batch_idx)

    def _critic_loss(self, t: Transitions) -> Tensor:
        return SAC._critic_loss(self, t) if self.observed else super()._critic_loss(t)

    def _calibrated(self, values: Tensor, t: Transitions) -> Tensor:
        return super()._calibrated(values, t) if self.offline == "cal_ql" else values

    def _backup_draws(self) -> int:
        return self.online_max_backup if self.observed else self.max_backup

    def act(self, observation: Any, explore: bool) -> np.ndarray:
        action = super().act(observation, explore)
        if explore and self.warmup_actions == "random" and self.observed < self.warmup_steps:
            return (2 * torch.rand(action.shape) - 1).numpy()
        return action

    def _waits(self) -> int:
        return max(self.warmup_steps, super()._waits())

    def _steps(self) -> int:
        return SAC._steps(self)

    def get_extra_state(self) -> dict[str, Any]:
        return super().get_extra_state() | {"learned_offline": self.learned_offline, "started": self.started}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        super().set_extra_state(state)
        self.learned_offline, self.started = state["learned_offline"], state["started"]
