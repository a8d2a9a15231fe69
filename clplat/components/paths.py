"""Losses along a straight line between two states of a model: whether two minima are connected.

Source   Garipov et al., "Loss Surfaces, Mode Connectivity, and Fast Ensembling of DNNs", NeurIPS 2018,
         arXiv:1802.10026; in continual learning Mirzadeh et al., "Linear Mode Connectivity in Multitask and Continual
         Learning", ICLR 2021, arXiv:2010.04495.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.func import functional_call

from clplat.components.losses import Losses
from clplat.strategy import evaluating


def path_losses(
    model: nn.Module, start: dict[str, Tensor], end: dict[str, Tensor], inputs: Tensor, labels: Tensor, points: int = 11
) -> Tensor:
    """Mean losses (points,) at (1 − α) start + α end, α evenly spaced in [0, 1]; parameters by name in `model`."""
    found = []
    with torch.no_grad(), evaluating(model):
        for alpha in torch.linspace(0, 1, points).tolist():
            mixed = {f"model.{name}": (1 - alpha) * start[name] + alpha * end[name] for name in start}
            found.append(functional_call(Losses(model), mixed, (inputs, labels)).mean())
    return torch.stack(found)


def barrier(losses: Tensor) -> float:
    """The most by which losses (points,) along a path exceed the line between its ends: 0 where modes are connected."""
    line = torch.linspace(0, 1, len(losses), device=losses.device)
    return float((losses - (1 - line) * losses[0] - line * losses[-1]).max())
