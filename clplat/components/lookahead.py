"""What an optimizer's next step would do, without taking it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


@torch.no_grad()
def simulated_step(optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    """Change of each of `parameters` that `optimizer.step()` would make with the gradients as they are.

    Neither parameters, gradients nor the optimizer's state are altered. A parameter without gradient does not change.
    """
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)  # as Fabric wraps it
    wanted, shadows, groups = {id(p) for p in parameters}, dict[int, Tensor](), []
    for group in inner.param_groups:
        chosen = [p for p in group["params"] if id(p) in wanted and p.grad is not None]
        shadows |= {id(p): p.detach().clone().requires_grad_() for p in chosen}
        if chosen:
            groups.append({**group, "params": [shadows[id(p)] for p in chosen]})
    changes = [torch.zeros_like(p) for p in parameters]
    if not groups:
        return changes
    make: Any = type(inner)
    shadow = make(groups)  # every option stands in the groups
    for p in (p for p in parameters if id(p) in shadows):
        copy = shadows[id(p)]
        assert p.grad is not None
        copy.grad = p.grad.clone()
        state = inner.state.get(p, {})
        if state:
            shadow.state[copy] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()}
    shadow.step()
    return [shadows[id(p)] - p if id(p) in shadows else c for p, c in zip(parameters, changes, strict=True)]


def add_gradient_ahead(
    optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter], loss: Callable[[], Tensor]
) -> None:
    """Add the gradient of `loss` at θ + Δθ to that of `parameters` θ; Δθ is what the optimizer would do without it."""
    changes, before = simulated_step(optimizer, parameters), [p.detach().clone() for p in parameters]
    with torch.no_grad():
        for p, change in zip(parameters, changes, strict=True):
            p.add_(change)
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    with torch.no_grad():
        for p, start, gradient in zip(parameters, before, gradients, strict=True):
            p.copy_(start)
            if gradient is not None:
                p.grad = gradient if p.grad is None else p.grad + gradient
