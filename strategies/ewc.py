"""EWC: a quadratic penalty holds the weights that mattered for the past.

Source   Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv:1612.00796;
         online: Schwarz et al., "Progress & Compress", ICML 2018, arXiv:1805.06370.
Checked  against Avalanche 0.6.0 training/plugins/ewc.py (MIT).
    loss = CE(f(x; θ), y) + λ Σ_t Σ_i F_ti (θ_i − θ*_ti)²
    F_t = mean over groups of b samples of (∂/∂θ mean_b CE)², at θ*_t, on the labels of experience t
    online: one F ← γ F + F_t, and θ* of the last experience
Differs  λ without the paper's ½, as in Avalanche. F uses the labels (the empirical Fisher), not labels drawn from the
         model. The sum over t is held as one quadratic, Σ_t F_t around the F-weighted mean of the θ*_t: the same
         gradient, a loss that is less by a constant, and no growth with t.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clplat import Experience, Kind, require
from clplat.components.consolidation import add_quadratic
from clplat.components.fisher import Samples, mean_squared_gradient
from clplat.components.losses import Losses
from clplat.components.per_parameter import trainable
from clplat.strategies._consolidated import Consolidated


def fisher(
    model: nn.Module, inputs: Tensor | Samples, labels: Tensor, group: int, task: int | None = 0
) -> dict[str, Tensor]:
    """Mean over groups of `group` consecutive samples (the last may be smaller) of the squared gradient of their mean
    cross-entropy, by parameter name. Inputs (n, ...) prepared, labels (n,)."""
    scored = Losses(model)
    parameters = {name: p.detach() for name, p in trainable(model).items()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        named = {f"model.{name}": value for name, value in values.items()}
        return functional_call(scored, named, (x, y, task)).mean()

    return mean_squared_gradient(loss, parameters, inputs, labels, group)


class EWC(Consolidated):
    """Elastic weight consolidation.

    Args:
        mode: separate adds a penalty for each experience; online keeps one, around the last weights.
        online_decay: γ in [0, 1], weight of the older importances in mode online.
        fisher_batch: b ≥ 1, samples whose gradients are averaged before they are squared; 1 is the empirical Fisher,
            the training batch what Avalanche computes (smaller by about b, so that λ is larger).
    """

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1612.00796"
    searched = {"penalty": (1.0, 1e4, "log")}

    def __init__(
        self,
        *,
        penalty: float = 100.0,
        mode: Literal["separate", "online"] = "separate",
        online_decay: float = 0.9,
        fisher_batch: int = 1,
        **base,
    ):
        super().__init__(penalty=penalty, **base)
        require("online_decay", online_decay, 0 <= online_decay <= 1, "in [0, 1]")
        require("fisher_batch", fisher_batch, fisher_batch >= 1, "≥ 1")
        self.mode, self.online_decay, self.fisher_batch = mode, online_decay, fisher_batch

    def end(self, experience: Experience) -> None:
        """Add this experience's Fisher information. Every process computes it whole, so that all agree."""
        assert experience.train is not None
        inputs, labels = Samples(experience.train, self.prepare), experience.train.targets()
        self.eval()
        found = fisher(self.model, inputs, labels, self.fisher_batch, experience.task)
        self.train()
        with torch.no_grad():
            if self.mode == "separate":
                add_quadratic(trainable(self.model), found, self.importance, self.centre)
                return
            for name, parameter in trainable(self.model).items():
                (importance,), (centre,) = self.importance.of([name]), self.centre.of([name])
                importance.mul_(self.online_decay).add_(found[name])
                centre.copy_(parameter)
