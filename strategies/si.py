"""SI: each weight's importance is its share in the fall of the loss along the path of training.

Source   Zenke, Poole, Ganguli, "Continual Learning Through Synaptic Intelligence", ICML 2017, arXiv:1703.04200.
Checked  by reading ganguli-lab/pathint pathint/protocols.py (86c5e07, MIT).
    loss = CE(f(x; θ), y) + c Σ_i Ω_i (θ_i − θ̃_i)²
    each step:       ω_i ← ω_i − g_i Δθ_i         g the gradient of CE alone, before clipping; Δθ what the optimizer did
    each experience: Ω_i ← max(0, Ω_i + ω_i / ((θ_i − θ̃_i)² + ξ)),   θ̃ ← θ,   ω ← 0
Differs  g is the whole gradient less the penalty's, 2 c Ω (θ − θ̃), which spares a second backward pass. The maximum
         is in the authors' code, not in the paper.
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.components.per_parameter import PerParameter, trainable


class SI(Strategy):
    """Synaptic intelligence.

    Args:
        penalty: c ≥ 0, weight of the penalty; 0 makes this `naive`. Too large a c diverges, with momentum sooner.
        damping: ξ > 0, keeps the importance of weights that hardly moved finite.
    """

    kinds = frozenset({Kind.LEARN})
    unmergeable = "its importances are shares of the whole way that the weights have gone"
    paper = "arXiv:1703.04200"
    unshardable = "importances of single weights, taken of whole gradients, stand beside them"
    searched = {"penalty": (0.01, 10.0, "log"), "damping": (1e-3, 1.0, "log")}

    def __init__(self, *, penalty: float = 0.1, damping: float = 0.1, **base):
        super().__init__(**base)
        require("penalty", penalty, penalty >= 0, "≥ 0")
        require("damping", damping, damping > 0, "> 0")
        self.penalty, self.damping = penalty, damping
        self.importance, self.anchor, self.path = (PerParameter(self.model) for _ in range(3))

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        for held in (self.importance, self.anchor, self.path):
            held.grow(self.model)

    @torch.no_grad()
    def begin(self, experience: Experience) -> None:
        parameters = trainable(self.model)
        for anchor, parameter in zip(self.anchor.of(parameters), parameters.values(), strict=True):
            anchor.copy_(parameter)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        loss = self.mean_loss(x, y)
        if self.penalty:
            loss = loss + self.penalty * sum((o * (p - a).square()).sum() for p, o, a, _ in self._each())
        return loss

    @torch.no_grad()
    def on_after_backward(self) -> None:
        """Remember θ and g: the optimizer moves the one, clipping scales the other."""
        self._before = []
        for p, importance, anchor, path in self._each():
            if p.grad is not None:
                gradient = p.grad - 2 * self.penalty * importance * (p - anchor)
                self._before.append((p, p.detach().clone(), gradient, path))

    @torch.no_grad()
    def after_step(self) -> None:
        for p, before, gradient, path in self._before:
            path.addcmul_(gradient, p - before, value=-1)

    @torch.no_grad()
    def end(self, experience: Experience) -> None:
        for p, importance, anchor, path in self._each():
            importance.add_(path / ((p - anchor).square() + self.damping)).clamp_(min=0)
            path.zero_()

    def _each(self) -> list[tuple[Tensor, Tensor, Tensor, Tensor]]:
        """(parameter, importance, anchor, path) of every trainable parameter."""
        parameters = trainable(self.model)
        held = (self.importance.of(parameters), self.anchor.of(parameters), self.path.of(parameters))
        return list(zip(parameters.values(), *held, strict=True))
