"""MAS: a quadratic penalty holds the weights that the outputs are sensitive to; no labels are needed for them.

Source   Aljundi et al., "Memory Aware Synapses: Learning What (not) to Forget", ECCV 2018, arXiv:1711.09601.
Checked  by reading rahafaljundi/MAS-Memory-Aware-Synapses MAS_utils/MAS_based_Training.py (c3e6a85) and Avalanche 0.6.0
         training/plugins/mas.py (MIT).
    loss = CE(f(x; θ), y) + λ Σ_i Ω_i (θ_i − θ*_i)²        θ* the weights after the last experience
    after each experience:  Ω_i ← Ω_i + mean over its samples of | ∂ ‖f(x; θ)‖² / ∂θ_i |
Differs  f are the logits of the classes met, as in the code; the gradient of each sample by itself, as in the paper
         (both codes add up those of a batch before taking the size, which lets them cancel; the authors' weighs a
         smaller last batch as a whole one). Ω is summed over experiences, as in the authors' code (Avalanche averages).
         The samples are those of the experience alone.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clplat import Experience, Kind
from clplat.components.fisher import Samples, mean_squared_gradient
from clplat.components.per_parameter import trainable
from clplat.strategies._consolidated import Consolidated


def sensitivity(model: nn.Module, inputs: Tensor | Samples, task: int | None = None) -> dict[str, Tensor]:
    """Mean over samples of the size of the gradient of ‖logits‖², by parameter name. Inputs (n, ...) prepared."""
    parameters = {name: p.detach() for name, p in trainable(model).items()}

    def squared_norm(values: dict[str, Tensor], x: Tensor, _: Tensor) -> Tensor:
        logits = functional_call(model, values, (x, task))  # (1, C)
        return torch.where(logits.isfinite(), logits, 0.0).square().sum()

    unused = torch.zeros(len(inputs), device=next(iter(parameters.values())).device)
    return mean_squared_gradient(squared_norm, parameters, inputs, unused, measure=torch.abs)


class MAS(Consolidated):
    """Memory aware synapses. B samples of a batch, n of an experience, C classes; Ω is the base's F."""

    kinds = frozenset({Kind.LEARN})
    paper = "arXiv:1711.09601"
    needs_classes = True
    searched = {"penalty": (1e-4, 10.0, "log")}

    def end(self, experience: Experience) -> None:
        """Add this experience's sensitivity. Every process computes it whole, so that all agree."""
        assert experience.train is not None
        self.eval()
        found = sensitivity(self.model, Samples(experience.train, self.prepare), experience.task)
        self.train()
        with torch.no_grad():
            for name, parameter in trainable(self.model).items():
                (importance,), (centre,) = self.importance.of([name]), self.centre.of([name])
                importance.add_(found[name])
                centre.copy_(parameter)
