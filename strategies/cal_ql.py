"""Cal-QL: CQL that does not push the policy's actions below what the data show can be reached.

Source   Nakamoto et al., "Cal-QL: Calibrated Offline RL Pre-Training", NeurIPS 2023, arXiv:2303.05479.
    as CQL, but in the penalty max(Q_i(s, a_k), G(s)) stands for the value of the policy's actions
    G(s) = Σ_t γ^t r_t from s to the end of its episode in the data, in scaled rewards
Differs  what the policy meets in an environment has no G, and is penalised as in CQL. An episode that was cut off
         has no tail: its G is low where rewards are positive, and high where they are negative.
"""

from __future__ import annotations

from torch import Tensor

from clplat.components.reinforcement import bounded
from clplat.data.transitions import Transitions
from clplat.strategies.cql import CQL


class CalQL(CQL):
    """Calibrated Q-learning.

    Args:
        failure_reward: scaled reward of a step without success, where the task is sparse: an episode of nothing else
            counts as one that goes on for ever. null: the task is not sparse.
    """

    paper = "arXiv:2303.05479"

    def __init__(self, *, failure_reward: float | None = None, **base):
        super().__init__(**base)
        self.failure_reward = failure_reward

    def _failure(self) -> float | None:
        return self.failure_reward

    def _calibrated(self, values: Tensor, t: Transitions) -> Tensor:
        return bounded(values, t.mc_return)
