"""Copies of a model that no optimizer touches: frozen ones, and slow ones that follow by an exponential moving average.

Both are always in eval mode and without gradients, whatever is done to the module that holds them.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clplat.components.losses import single_losses
from clplat.components.per_parameter import attribute, trainable
from clplat.strategy import evaluating, require


class Frozen(nn.Module):
    """A copy of `model` as it is now: a teacher, or the weights to go back to."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = copy.deepcopy(model).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.model(*args, **kwargs)

    @torch.no_grad()
    def grow(self, model: nn.Module) -> None:
        """Take the structure that `model` has grown to; what was there keeps its values, new parts take the model's.

        Buffers of integers and booleans are structure (which classes a head knows), and so the model's.
        """
        old = self.model
        # What is sharded over processes can't be copied, and never grows: the copy's own part goes on.
        kept = {id(m): old.get_submodule(n) for n, m in model.named_modules() if hasattr(m, "unshard")}
        self.model = copy.deepcopy(model, kept).requires_grad_(False)
        before = _tensors(old)
        for name, new in _tensors(self.model).items():
            if name in before and new is not before[name] and new.is_floating_point():
                _overlap(new, before[name]).copy_(_overlap(before[name], new))
        self.eval()

    def copy_to(self, model: nn.Module) -> None:
        """Give `model`, of the same structure, these parameters and buffers."""
        _copy(self.model, model)

    def take(self, model: nn.Module) -> None:
        """Take the parameters and buffers of `model`, of the same structure."""
        _copy(model, self.model)


class EMA(Frozen):
    """Slow copy of a model: θ_slow ← d θ_slow + (1 − d) θ; buffers (batch-norm statistics) are copied.

    Kept in float32 where the model is in half precision: at d = 0.999 the steps would round away. Call `update` once
    after each optimizer step, and `grow` after the model has grown.

    Args:
        model: to follow.
        decay: weight of the old slow copy, in [0, 1]; 0 keeps no past.
        warmup: use d = min(1 − 1/(k+1), decay) after step k, so that the first steps do not outweigh the rest; then
            decay 1 is the plain mean of the start and all steps. Without it decay 1 never moves.
    """

    def __init__(self, model: nn.Module, decay: float, warmup: bool = True) -> None:
        super().__init__(model)
        require("decay", decay, 0 <= decay <= 1, "in [0, 1]")
        self.decay, self.warmup, self.steps = decay, warmup, 0
        self._widen()

    def _widen(self) -> None:
        for parameter in self.model.parameters():
            if parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data = parameter.data.float()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        kind = next(self.model.parameters()).dtype
        return super().forward(*(_as(kind, a) for a in args), **kwargs)

    def grow(self, model: nn.Module) -> None:
        super().grow(model)
        self._widen()

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """One step towards `model`, which has the same structure."""
        self.steps += 1
        decay = min(1 - 1 / (self.steps + 1), self.decay) if self.warmup else self.decay
        slow: list[Tensor] = list(self.model.parameters())
        fast = [p.to(s.dtype) for p, s in zip(model.parameters(), slow, strict=True)]
        torch._foreach_lerp_(slow, fast, 1 - decay)
        for mine, theirs in zip(self.model.buffers(), model.buffers(), strict=True):
            mine.copy_(theirs)

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state


class Slow(nn.Module):
    """The running average of a model's trainable parameters, in single precision at least, and its count of steps.

    Held as parameters without gradient, not as buffers, which DDP by default sends to all processes in every forward
    pass.
    """

    def __init__(self) -> None:
        super().__init__()
        self.values, self.steps = nn.ParameterDict(), 0

    @torch.no_grad()
    def grow(self, model: nn.Module) -> None:
        """Take the model's values of what is new in it: parameters, and rows of those that grew."""
        for name, parameter in trainable(model).items():
            old = self.values[attribute(name)] if attribute(name) in self.values else parameter[:0]
            if old.shape != parameter.shape:
                value = parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
                value[: len(old)] = old
                self.values[attribute(name)] = nn.Parameter(value, requires_grad=False)

    @torch.no_grad()
    def update(self, model: nn.Module, decay: float) -> None:
        """One step towards the model, with `decay` the weight of the old values."""
        self.steps += 1
        slow, fast = list(self.named().values()), trainable(model)
        torch._foreach_lerp_(slow, [fast[n].to(s.dtype) for n, s in zip(self.named(), slow, strict=True)], 1 - decay)

    def named(self) -> dict[str, Tensor]:
        """Values by the parameters' names in the model."""
        return {key.replace("/", "."): value for key, value in self.values.items()}

    def losses(self, model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        """Losses (B,) by the model with these values in place of its own, in single precision; without gradients."""
        with torch.no_grad(), evaluating(model):
            return single_losses(model, inputs, labels, self.named())

    def predict(self, model: nn.Module, inputs: Tensor, task: int | None = None) -> Tensor:
        """Logits (B, C) for inputs (B, ...), by the model with these values in place of its own."""
        named = {f"model.{name}": value for name, value in self.named().items()}
        return functional_call(_Predict(model), named, (inputs, task))

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with these values in its parameters, cast to their types; then its own again."""
        own = {name: (p, p.detach().clone()) for name, p in trainable(model).items() if name in self.named()}
        try:
            for name, value in self.named().items():
                own[name][0].data.copy_(value)
            yield
        finally:
            for parameter, value in own.values():
                parameter.data.copy_(value)

    def get_extra_state(self) -> int:
        return self.steps

    def set_extra_state(self, state: int) -> None:
        self.steps = state


class _Predict(nn.Module):
    """Prediction as the forward pass of a module, for `functional_call`; parameters are `model.<name>`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor, task: int | None) -> Tensor:
        return getattr(self.model, "predict", self.model)(inputs, task)


def _as(dtype: torch.dtype, value: Any) -> Any:
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


@torch.no_grad()
def _copy(source: nn.Module, target: nn.Module) -> None:
    values = _tensors(source)
    for name, tensor in _tensors(target).items():
        tensor.copy_(values[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _overlap(tensor: Tensor, other: Tensor) -> Tensor:
    """The part of `tensor` whose indices exist in `other` too."""
    return tensor[tuple(slice(min(a, b)) for a, b in zip(tensor.shape, other.shape, strict=True))]
