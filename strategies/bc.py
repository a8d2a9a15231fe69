"""BC: imitate the actions of the data.

Source   Pomerleau, "ALVINN", NeurIPS 1988; for a Gaussian policy as in Fujimoto and Gu, arXiv:2106.06860, section 5.
    loss = −E log π(a|s)        over the offline data
Differs  in the environment the policy only acts: there is nobody to imitate.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from clplat.data.transitions import Transitions
from clplat.strategies._agent import OffPolicy


class BC(OffPolicy):
    """Behaviour cloning. B transitions."""

    paper = "doi:10.5555/89851.89891"

    def _loss(self, t: Transitions) -> Tensor:
        return self._held(-self.model.log_prob(self.model.encode(t.observation).detach(), t.action).mean())

    def observe(self, transition: Any) -> int:
        """Nothing is stored and nothing is learned."""
        return 0
