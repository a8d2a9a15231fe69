"""Quadratic penalties that hold parameters where the past needs them, and how much a policy needs each of its own.

Shapes: n states, d numbers of an encoded one, a of an action.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clplat.components.fisher import mean_squared_gradient
from clplat.components.per_parameter import PerParameter, trainable


def quadratic(parameters: list[Tensor], importance: list[Tensor], centre: list[Tensor]) -> Tensor:
    """Σ_i F_i (θ_i − c_i)² over all parameters; a scalar."""
    return torch.stack(
        [(f * (p - c).square()).sum() for p, f, c in zip(parameters, importance, centre, strict=True)]
    ).sum()


@torch.no_grad()
def add_quadratic(
    parameters: Mapping[str, Tensor], found: Mapping[str, Tensor], importance: PerParameter, centre: PerParameter
) -> None:
    """Make of Σ_i F_i (θ_i − c_i)² its sum with Σ_i `found`_i (θ_i − `parameters`_i)², but for a constant."""
    for name, parameter in parameters.items():
        (f,), (c,), new = importance.of([name]), centre.of([name]), found[name]
        f.add_(new)
        c.lerp_(parameter, torch.where(f > 0, new / f, 0.0))


def policy_fisher(actor: nn.Module, encoded: Tensor) -> dict[str, Tensor]:
    """Diagonal of the Fisher information of a squashed Gaussian policy, by parameter name; mean over states.

        F_i = E_s Σ_k (∂μ_k/∂θ_i)² / σ_k² + 2 (∂ log σ_k/∂θ_i)²

    Exact over actions: of log π it is what their distribution gives in expectation, and tanh changes nothing in it.

    Args:
        actor: gives mean and deviation (n, a) for encoded states.
        encoded: (n, d), n ≥ 1.
    """
    parameters = {name: p.detach() for name, p in trainable(actor).items()}
    outputs = 2 * actor(encoded[:1])[0].shape[1]

    def output(values: dict[str, Tensor], state: Tensor, which: Tensor) -> Tensor:
        mean, std = functional_call(actor, values, (state,))
        return (torch.cat([mean / std.detach(), 2**0.5 * std.log()], -1) * which).sum()

    states, which = encoded.repeat_interleave(outputs, 0), torch.eye(outputs).to(encoded).repeat(len(encoded), 1)
    found = mean_squared_gradient(output, parameters, states, which)
    return {name: outputs * f for name, f in found.items()}


class PolicyConsolidation(nn.Module):
    """Elastic weight consolidation of an actor over environments.

    Args:
        actor: whose parameters are held.
    """

    def __init__(self, actor: nn.Module) -> None:
        super().__init__()
        self.importance, self.centre = PerParameter(actor), PerParameter(actor)

    def add(self, actor: nn.Module, encoded: Tensor) -> None:
        """Hold the actor as it is now, by its Fisher information on encoded states (n, d)."""
        add_quadratic(trainable(actor), policy_fisher(actor, encoded), self.importance, self.centre)

    def penalty(self, actor: nn.Module) -> Tensor:
        """Σ_t Σ_i F_ti (θ_i − θ*_ti)² but for a constant; a scalar, 0 before the first `add`."""
        names = trainable(actor)
        return quadratic(list(names.values()), self.importance.of(names), self.centre.of(names))
