"""RLPD: online learning with the offline data in every batch, and no training before.

Source   Ball et al., "Efficient Online Reinforcement Learning with Offline Data", ICML 2023, arXiv:2302.02948.
    each mini-batch: half of it from the offline data, half from the environment
    N critics with layer norm, targets from M of them, U critic steps for each step in the environment
    actor          E[α log π(ã|s) − mean_i Q_i(s, ã)],  once for each step in the environment, on all U batches
Differs  the first `random_steps` take random actions, as published; nothing is learned from the data alone, which are
         copied into the learner's state: what the method keeps is counted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clplat import Experience
from clplat.strategies.redq import REDQ
from clplat.stream import Data


class RLPD(REDQ):
    """Reinforcement learning with prior data; the backbone holds the N critics (10 in the paper).

    Args:
        retain: share of each mini-batch that comes from the offline data, in [0, 1).
        target_entropy: H̄; null is −a / 2.
        random_steps: so many first steps in each environment take uniform actions, and nothing is learned, ≥ 0.
    """

    paper = "arXiv:2302.02948"
    unbounded_memory = True
    data_access = "keeps all offline data, and the last transitions of the environment"

    def __init__(
        self, *, retain: float = 0.5, target_entropy: float | None = None, random_steps: int = 5000, **base
    ):  # fmt: skip
        super().__init__(retain=retain, random_steps=random_steps, target_entropy=target_entropy, **base)
        if target_entropy is None:
            self.target_entropy = -self.model.actions / 2

    def faults(self, experiences: Sequence[Experience], started: bool) -> list[str]:
        without = self._without_data(experiences) if self.retain else None
        line = f"strategy: RLPD needs offline data, but {without} has none (valid: sac, redq)"
        return [] if without is None else [line]

    def training_data(self, experience: Experience) -> Data:
        """Nothing: the data are in the memory, for later."""
        assert experience.train is not None
        return experience.train.subset(torch.arange(0))
