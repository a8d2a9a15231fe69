"""What agents have in common: acting, a memory of transitions, the data of an offline phase, one optimizer.

Offline a step is taken on each batch of the data; online the memory is sampled. r = reward_scale · reward + bias.

Shapes: B transitions of a batch, n of the data, a numbers of an action, w of a packed transition
(`clplat.data.transitions`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat import Experience, Kind, require
from clplat.components.reinforcement import monte_carlo_returns
from clplat.components.transitions import TransitionMemory
from clplat.data.transitions import Transitions, pack_step, unpack
from clplat.strategies._environments import AcrossEnvironments
from clplat.stream import Data


class OffPolicy(AcrossEnvironments):
    """Common part. A subclass writes `_loss`, of all it learns in one step; steps begin when a batch is held.

    Args:
        gamma: discount, in [0, 1).
        polyak: share of the critics in their slow copy at each step, in [0, 1].
        batch: B, transitions of an online mini-batch, ≥ 1 (offline it is loop.batch_size).
        memory: transitions kept of the environment, ≥ 1; empty at the start of each experience but for `keep_memory`.
        retain: share of each online mini-batch that comes from the offline data, in [0, 1); 0 lets go of the data.
        reward_scale: > 0.
        reward_bias: added to each scaled reward.
    """

    kinds = frozenset({Kind.INTERACT})
    searched = {"lr": (3e-5, 3e-3, "log")}

    def __init__(
        self, *, gamma: float = 0.99, polyak: float = 0.005, batch: int = 256, memory: int = 1_000_000,
        retain: float = 0.0, reward_scale: float = 1.0, reward_bias: float = 0.0, **base,
    ):  # fmt: skip
        super().__init__(**base)
        require("gamma", gamma, 0 <= gamma < 1, "in [0, 1)")
        require("polyak", polyak, 0 <= polyak <= 1, "in [0, 1]")
        require("batch", batch, batch >= 1, "≥ 1")
        require("retain", retain, 0 <= retain < 1, "in [0, 1)")
        require("reward_scale", reward_scale, reward_scale > 0, "> 0")
        self.gamma, self.polyak, self.batch, self.retain = gamma, polyak, batch, retain
        self.reward_scale, self.reward_bias = reward_scale, reward_bias
        self.memory = TransitionMemory(memory, self.model.actions)
        self.offline_data = TransitionMemory(2**62, self.model.actions)  # as large as the data; empty unless `retain`
        self.observed = 0  # steps in the environment of this experience
        self._critics_moved = False

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        if self.restart:
            self.offline_data.clear()

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        self.observed = 0
        if not self.keep_memory:
            self.memory.clear()
        if self.retain and experience.train is not None:
            self.offline_data.clear()
            offline = OffPolicy.training_data(self, experience).inputs
            assert isinstance(offline, Tensor)
            self.offline_data.add(offline)

    def _visited(self, experience: Experience, n: int) -> Tensor | None:
        if self.observed:
            rows = self.memory.sample(n, newest=self.observed)
        elif experience.train is not None and len(experience.train):
            rows = experience.train.all()[0][torch.randint(len(experience.train), (n,))]
        else:
            return None
        return unpack(rows.to(self.device), self.model.actions).observation

    def training_data(self, experience: Experience) -> Data:
        """The offline data, with returns of their episodes in this strategy's units."""
        assert experience.train is not None
        rows = experience.train.all()[0]
        t = self._scaled(unpack(rows, self.model.actions))
        returns = monte_carlo_returns(t.reward, t.terminated, t.truncated, self.gamma, self._failure())
        return Data(torch.cat([rows[:, :-1], returns.unsqueeze(1)], 1), None)

    def _without_data(self, experiences: Sequence[Experience]) -> str | None:
        """Name of the first experience that has no offline data, and none before it that still count; None: of none."""
        for e in experiences:
            if e.train is None:
                return e.name
            if not self.restart:
                return None
        return None

    def _failure(self) -> float | None:
        """Scaled reward of a step without success, where the task is sparse."""
        return None

    def act(self, observation: Any, explore: bool) -> np.ndarray:
        """Actions (a,) or (E, a) in [-1, 1] for one observation or E: drawn from the policy, or its mode."""
        seen = torch.from_numpy(np.asarray(observation, dtype=np.float32)).to(self.device)
        single = seen.ndim == len(self.model.backbone.input_shape)
        with torch.no_grad():
            inputs = seen[None] if single else seen
            action = self.model.draw(self.model.encode(inputs)) if explore else self.model(inputs)
        return (action[0] if single else action).cpu().numpy()

    def observe(self, transition: Any) -> int:
        """Store one step; how many training steps to take now."""
        self.memory.add(pack_step(transition))
        self.observed += 1
        return 0 if self.observed <= self._waits() else self._steps()

    def _waits(self) -> int:
        """Steps in the environment before the first update."""
        return self.batch

    def _steps(self) -> int:
        """Training steps after each step in the environment."""
        return 1

    def training_step(self, batch: tuple[Tensor, Tensor] | None, batch_idx: int) -> Tensor:
        rows = self._draw(1) if batch is None else batch[0]
        return self._loss(self._scaled(unpack(rows, self.model.actions)))

    def after_step(self) -> None:
        if self._critics_moved:
            self.model.follow(self.polyak)

    def _loss(self, t: Transitions) -> Tensor:
        raise NotImplementedError

    def _scaled(self, t: Transitions) -> Transitions:
        return t._replace(reward=self.reward_scale * t.reward + self.reward_bias)

    def _draw(self, batches: int) -> Tensor:
        """Rows (batches · B, w) of the memory, of each B the share `retain` from the offline data."""
        old = round(self.retain * self.batch) if len(self.offline_data) else 0
        rows = self.memory.sample(batches * (self.batch - old))
        if not old:
            return rows
        kept = self.offline_data.sample(batches * old).unflatten(0, (batches, old))
        return torch.cat([kept, rows.unflatten(0, (batches, -1))], 1).flatten(0, 1)

    def get_extra_state(self) -> dict[str, Any]:
        return {"observed": self.observed}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self.observed = state["observed"]
