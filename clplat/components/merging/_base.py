"""What every merge is: it sees a learn experience begin, each step of it, and its end."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from clplat.components.per_parameter import trainable
from clplat.errors import UserError
from clplat.strategy import Strategy


class Merge:
    """Base. A subclass writes what happens to the model; all that it keeps is there within an experience alone.

    The loop calls `begin` once the model has grown and before the strategy's `begin`, `before_step` with gradients that
    are ready for the optimizer, `after_step`, and `end` before the strategy's `end`: importances, exemplars and means
    are taken of the merged weights. Every process computes all of it alike.

    Args:
        skip: experiences at the start of the stream that are left as learned, ≥ 0: 1 where the backbone begins
            untrained, which is nothing to go back to; 0 as in papers, which start from pretrained weights.
    """

    paper: ClassVar[str] = ""
    by_factors: ClassVar[bool] = False  # whether it has a meaning for the factors of a low-rank change, one by one

    def __init__(self, *, skip: int = 1) -> None:
        require("skip", skip, skip >= 0, "≥ 0")
        self.skip = skip

    def faults(self, strategy: Strategy) -> list[str]:
        """Why it can't be used with this strategy, one line each; asked before anything runs."""
        return []

    def begin(self, strategy: Strategy) -> None:
        """Before an experience is learned."""

    def before_step(self, strategy: Strategy) -> None:
        """Before each optimizer step."""

    def after_step(self, strategy: Strategy) -> None:
        """After each optimizer step."""

    def end(self, strategy: Strategy) -> None:
        """After the last step."""

    def measurements(self) -> dict[str, float]:
        """Numbers to log of the last experience, as `merge/<name>`."""
        return {}

    def state(self) -> dict[str, Any]:
        """What it holds, as tensors and plain values."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`; tensors are on the device of the run."""


class Anchored(Merge):
    """A merge that compares the weights with those before the experience. It needs a copy of what is trained.

    What is meant are the parameters that are trained when the experience begins and, with `statistics`, the running
    means and variances of normalisation layers; the head, whose new rows have no past, stays as learned.
    """

    statistics: ClassVar[bool] = True

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.before: dict[str, Tensor] = {}  # by name in the model

    def begin(self, strategy: Strategy) -> None:
        self.before = {name: t.detach().clone() for name, t in self.named(strategy.model).items()}

    def named(self, model: nn.Module) -> dict[str, Tensor]:
        """The model's own tensors that are merged."""
        head: Any = getattr(model, "head", nn.Identity())
        apart = {id(p) for p in head.parameters()}
        found: dict[str, Tensor] = {name: p for name, p in trainable(model).items() if id(p) not in apart}
        return found | (running(model) if self.statistics else {})

    @torch.no_grad()
    def end(self, strategy: Strategy) -> None:
        own = self.named(strategy.model)
        if late := sorted(own.keys() - self.before.keys()):
            raise UserError(f"merge: {type(strategy).__name__} thawed {late[0]} after `grow`: it has no weights before")
        everything = {**dict(strategy.model.named_parameters()), **dict(strategy.model.named_buffers())}
        now = {name: everything[name] for name in self.before}
        changes = {name: tensor.detach() - self.before[name] for name, tensor in now.items()}
        for name, change in self.merged(strategy, changes).items():
            now[name].copy_(self.before[name] + change)
        self.before = {}

    def merged(self, strategy: Strategy, changes: dict[str, Tensor]) -> dict[str, Tensor]:
        """The changes that are made instead of those that were learned, by name."""
        raise NotImplementedError

    def state(self) -> dict[str, Any]:
        return {"before": self.before}

    def load(self, state: dict[str, Any]) -> None:
        self.before = state["before"]


def running(model: nn.Module) -> dict[str, Tensor]:
    """Running means and variances of normalisation layers, by name."""
    return {
        f"{path}.{name}" if path else name: tensor
        for path, module in model.named_modules()
        if isinstance(module, _NormBase)
        for name, tensor in module.named_buffers(recurse=False)
        if tensor.is_floating_point()
    }


def require(name: str, value: object, holds: bool, valid: str) -> None:
    """Refuse an option out of range, naming it, its value and the valid range."""
    if not holds:
        raise UserError(f"merge.{name}: {value!r} is out of range (valid: {valid})")
