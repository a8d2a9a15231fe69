"""IQL: values of the better actions in the data, without asking for any other action.

Source   Kostrikov, Nair, Levine, "Offline RL with Implicit Q-Learning", ICLR 2022, arXiv:2110.06169.
    value          E |τ − 1(u < 0)| u²,  u = min_i Q̄_i(s, a) − V(s)
    critics        mean (Q_i(s, a) − r − γ (1 − terminated) V(s'))²
    actor          −E min(exp(β (min_i Q̄_i(s, a) − V(s))), 100) log π(a|s)
Differs  all three step at once, from the weights before the step. The policy is squashed by tanh, as all here. In an
         environment the same losses go on, with the memory for data (and the share `retain` of the data set).
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import require
from clplat.backbones.actor_critic import Critics
from clplat.components.reinforcement import advantage_weighted_loss, critic_loss, expectile_loss, td_target
from clplat.data.transitions import Transitions
from clplat.strategies._agent import OffPolicy


class IQL(OffPolicy):
    """Implicit Q-learning. B transitions.

    Args:
        expectile: τ in (0, 1); 0.5 is the mean, near 1 the best action in the data.
        inverse_temperature: β ≥ 0; 0 is behaviour cloning.
        value_hidden: width of each hidden layer of V, > 0.
    """

    paper = "arXiv:2110.06169"
    searched = {"expectile": (0.5, 0.95), "inverse_temperature": (0.5, 10.0, "log")}

    def __init__(
        self, *, expectile: float = 0.7, inverse_temperature: float = 3.0,
        value_hidden: list[int] = [256, 256],  # noqa: B006
        **base,
    ):  # fmt: skip
        super().__init__(**base)
        require("expectile", expectile, 0 < expectile < 1, "in (0, 1)")
        require("inverse_temperature", inverse_temperature, inverse_temperature >= 0, "≥ 0")
        require("value_hidden", value_hidden, all(h > 0 for h in value_hidden), "widths > 0")
        self.expectile, self.inverse_temperature = expectile, inverse_temperature
        self.value = Critics(self.model.width, value_hidden, members=1, layer_norm=False)

    def _more_parameters(self) -> list[torch.nn.Parameter]:
        return list(self.value.parameters())

    def _loss(self, t: Transitions) -> Tensor:
        self._critics_moved = True
        encoded = self.model.encode(t.observation)
        known = encoded.detach()
        with torch.no_grad():
            following = self.value(self.model.encode(t.next_observation))[0]  # (B,)
            held = self.model.q(self.model.encode(t.observation, target=True), t.action, target=True).amin(0)
        value = self.value(known)[0]
        target = td_target(t.reward, t.terminated, following, self.gamma)
        loss = expectile_loss(held - value, self.expectile)
        loss = loss + critic_loss(self.model.q(encoded, t.action), target)
        log_prob = self.model.log_prob(known, t.action)
        return loss + self._held(advantage_weighted_loss(log_prob, held - value, self.inverse_temperature))

    @torch.no_grad()
    def probe(self, transitions: Transitions) -> dict[str, Tensor]:
        """Mean of the critics and its distance from a target, both (n,)."""
        t = self._scaled(transitions)
        q = self.model.q(self.model.encode(t.observation), t.action).mean(0)
        following = self.value(self.model.encode(t.next_observation))[0]
        return {"q": q, "td_error": (q - td_target(t.reward, t.terminated, following, self.gamma)).abs()}
