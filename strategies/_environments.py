"""What agents do from one environment to the next: go on, begin anew, or hold the policy that the earlier ones need.

Source   EWC of a policy: Kirkpatrick et al., 2017, arXiv:1612.00796, as in Wołczyk et al., "Continual World", NeurIPS
         2021, arXiv:2105.10919, on the actor alone.
Checked  against awarelab/continual_world 73f63bb continualworld/methods/ewc.py (no licence file: read, not copied).
    actor's loss + λ Σ_t Σ_i F_ti (θ_i − θ*_ti)²
    F_t = E_s Σ_k (∂μ_k/∂θ)² / σ_k² + 2 (∂ log σ_k/∂θ)²  at θ*_t, over 2560 states met in environment t
Differs  the actor's heads are shared by the environments, and held too. F has no floor (theirs is 1e-5 a state). Each
         quadratic keeps its own centre θ*_t (theirs: all the last one's), summed up as in strategy `ewc`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from clplat import Experience, Strategy, UserError, require
from clplat.backbones.actor_critic import Agent
from clplat.components.consolidation import PolicyConsolidation
from clplat.components.per_parameter import PerParameter, trainable

STATES = 2560  # that F is the mean over, drawn with replacement: ten batches, as published


class AcrossEnvironments(Strategy):
    """Common part of agents.

    Args:
        optimizer: sgd, adam or adamw; one for all networks, goes on from the data into the environment.
        lr: learning rate of the critics, > 0.
        actor_lr: of the actor, > 0; null takes `lr`.
        temperature_lr: of the temperature, > 0; null takes `lr`.
        keep_memory: keep the transitions of earlier environments: experience replay over a sequence of them.
        ewc_penalty: λ ≥ 0, elastic weight consolidation of the policy over a sequence of environments; 0 holds nothing.
        restart: begin each environment with the weights of the first one's beginning, and an optimizer of its own:
            what each is alone, for key `reference`.
    """

    carries_optimizer = True
    unshardable = "an environment is not split between processes"
    model: Agent

    def __init__(
        self, *, model: Agent, optimizer: Literal["sgd", "adam", "adamw"] = "adam", lr: float = 3e-4,
        actor_lr: float | None = None, temperature_lr: float | None = None, keep_memory: bool = False,
        ewc_penalty: float = 0.0, restart: bool = False, **base,
    ):  # fmt: skip
        super().__init__(model=model, optimizer=optimizer, lr=lr, **base)
        if not hasattr(model, "groups"):
            raise UserError("strategy: an agent needs an actor and critics (valid: backbone actor_critic)")
        given = {"critic": lr, "actor": actor_lr, "temperature": temperature_lr}
        self.rates = {name: lr if rate is None else rate for name, rate in given.items()}
        for name, rate in self.rates.items():
            require(f"{name}_lr", rate, rate > 0, "> 0")
        require("ewc_penalty", ewc_penalty, ewc_penalty >= 0, "≥ 0")
        if restart and (keep_memory or ewc_penalty):
            raise UserError(
                "strategy.restart: true, but keep_memory or ewc_penalty keeps the past (valid: one of them)"
            )
        self.keep_memory, self.ewc_penalty, self.restart = keep_memory, ewc_penalty, restart
        if restart:
            self.carries_optimizer = False  # type: ignore[misc]
        self.initial: PerParameter | None = None
        self.consolidation: PolicyConsolidation | None = None

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        if self.restart and self.initial is None:
            self.initial = PerParameter(self)
            self._copy(self.initial, back=False)
        if self.ewc_penalty and self.consolidation is None:
            self.consolidation = PolicyConsolidation(self.model.backbone.actor)

    def begin(self, experience: Experience) -> None:
        if self.initial is not None and experience.index > 0:
            self._copy(self.initial, back=True)
            self.model.follow(1.0)

    def end(self, experience: Experience) -> None:
        if self.consolidation is not None and (visited := self._visited(experience, STATES)) is not None:
            with torch.no_grad():
                encoded = self.model.encode(visited)
            self.consolidation.add(self.model.backbone.actor, encoded)

    def _visited(self, experience: Experience, n: int) -> Tensor | None:
        """n observations of this experience (n, o), drawn with replacement; None where nothing was learned from any."""
        raise NotImplementedError

    def _held(self, loss: Tensor) -> Tensor:
        """The actor's loss, and what holds the actor."""
        if self.consolidation is None:
            return loss
        return loss + self.ewc_penalty * self.consolidation.penalty(self.model.backbone.actor)

    @torch.no_grad()
    def _copy(self, held: PerParameter, back: bool) -> None:
        own = trainable(self)
        for parameter, kept in zip(own.values(), held.of(own), strict=True):
            (parameter if back else kept).copy_(kept if back else parameter)

    def _more_parameters(self) -> list[torch.nn.Parameter]:
        """What a subclass trains beside the model, at rate `lr`."""
        return []

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """One optimizer of several groups; parameters that a step gives no gradient are left as they are."""
        parts = [(ps, self.rates[name]) for name, ps in self.model.groups().items()]
        parts += [([p], self.lr) for p in self._more_parameters()]
        groups = [{"params": [p for p in ps if p.requires_grad], "lr": lr} for ps, lr in parts]
        if self.optimizer_name == "sgd":
            return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, weight_decay=self.weight_decay)
        cls = torch.optim.Adam if self.optimizer_name == "adam" else torch.optim.AdamW
        return cls(groups, lr=self.lr, weight_decay=self.weight_decay, fused=True)
