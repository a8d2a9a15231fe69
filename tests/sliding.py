"""An environment of one line of arithmetic: standing still is best, so that any agent that has learned beats chance."""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np

LENGTH = 20


class Sliding(gymnasium.Env[np.ndarray, np.ndarray]):
    """A point on a line; actions in [-2, 2] move it, and cost their square."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Box(-100, 100, (2,), np.float64)
        self.action_space = gymnasium.spaces.Box(-2, 2, (1,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[np.ndarray, dict[str, Any]]:
        super().reset(seed=seed)
        self.at = np.float32(self.np_random.uniform(-1, 1))
        return self._seen(), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        self.at = np.float32(self.at + action[0] / 8)
        return self._seen(), -float(np.square(action[0])), False, False, {}

    def _seen(self) -> np.ndarray:
        return np.array([self.at, abs(self.at)], dtype=np.float64)


class Seeing(Sliding):
    """The same, seen as an image."""

    def __init__(self) -> None:
        super().__init__()
        self.observation_space = gymnasium.spaces.Box(0, 255, (24, 24, 3), np.uint8)

    def _seen(self) -> np.ndarray:
        return np.full((24, 24, 3), 128, dtype=np.uint8)


if "Sliding-v0" not in gymnasium.registry:
    gymnasium.register("Sliding-v0", entry_point="sliding:Sliding", max_episode_steps=LENGTH)
    gymnasium.register("Seeing-v0", entry_point="sliding:Seeing", max_episode_steps=LENGTH)
