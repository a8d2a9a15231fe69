"""Agents that break one rule each; the attribute `fails` names the check that must find it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.strategies.sac import SAC


class GreedyDraws(SAC):
    """Samples its policy when it is evaluated."""

    fails = "acting"

    def act(self, observation: Any, explore: bool) -> np.ndarray:
        return super().act(observation, True)


class SecretlyDraws(SAC):
    """Uses up random numbers when it is evaluated, so that an evaluation changes the run."""

    fails = "acting"

    def act(self, observation: Any, explore: bool) -> np.ndarray:
        torch.rand(())
        return super().act(observation, explore)


class OwnUnits(SAC):
    """Acts in the units of some environment."""

    fails = "acting"

    def act(self, observation: Any, explore: bool) -> np.ndarray:
        return 2 * super().act(observation, explore) + 1.5


class OneAtATime(SAC):
    """Gives one action for all observations."""

    fails = "acting"

    def act(self, observation: Any, explore: bool) -> np.ndarray:
        action = super().act(observation, explore)
        return action[0] if action.ndim == 2 else action


class CountsEvaluations(SAC):
    """Changes when it is only asked."""

    fails = "acting"

    def act(self, observation: Any, explore: bool) -> np.ndarray:
        self.observed += not explore
        return super().act(observation, explore)


class ProbeDraws(SAC):
    """Draws when it is measured."""

    fails = "acting"

    def probe(self, transitions: Any) -> dict[str, Tensor]:
        torch.rand(())
        return super().probe(transitions)
