"""What `loop.diagnostics` asks for after each experience, against the weights that the run began with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from clplat.adapters.effective import effective_weights
from clplat.backbones.answering import read_ids
from clplat.backbones.base import Classifier
from clplat.components.ema import Frozen
from clplat.metrics.tuning import intruder_dimensions, tuning_contribution
from clplat.strategy import Strategy, evaluating

PROMPTS = 256


class Diagnostics:
    """Keeps a copy of the backbone as the run began, and its layers' weights as the last experience left them.

    Args:
        asked: names of `loop.diagnostics`.
        strategy: as the run begins.
    """

    def __init__(self, asked: Sequence[str], strategy: Strategy) -> None:
        self.asked = asked
        model = strategy.model if asked and isinstance(strategy.model, Classifier) else None
        self.origin = None if model is None else Frozen(model.backbone)
        self.before = None if self.origin is None else self._weights(self.origin.model)

    def measure(self, strategy: Strategy, inputs: Tensor | None) -> dict[str, float | None]:
        """One number for each name; None where it has no meaning for this network.

        Args:
            inputs: (n, ...) prepared, of held-out data.
        """
        found: dict[str, float | None] = {}
        if "intruder_dimensions" in self.asked:
            found |= dict.fromkeys(("intruder_dimensions", "new_intruder_dimensions"))
            found |= self._intruders(strategy)
        if "tuning_contribution" in self.asked:
            found["tuning_contribution"] = None if inputs is None else self._contribution(strategy, inputs[:PROMPTS])
        return found

    def _weights(self, backbone: Any) -> dict[str, Tensor] | None:
        return effective_weights(backbone) if "intruder_dimensions" in self.asked else None

    def _intruders(self, strategy: Strategy) -> dict[str, float | None]:
        """Sums over the layers' matrices, against those of the run's beginning and of the experience's."""
        model: Any = strategy.model
        now = None if self.origin is None else self._weights(model.backbone)
        first = None if self.origin is None else self._weights(self.origin.model)
        if now is None or first is None or self.before is None:
            return {}
        references = {"intruder_dimensions": first, "new_intruder_dimensions": self.before}
        self.before = now
        return {
            name: float(sum(intruder_dimensions(old[layer], now[layer]) for layer in now))
            for name, old in references.items()
        }

    def _contribution(self, strategy: Strategy, inputs: Tensor) -> float | None:
        """The mean over texts."""
        model: Any = strategy.model
        if self.origin is None or not model.backbone.residual:
            return None
        last = ((read_ids(inputs) >= 0).sum(1) - 1).clamp(min=0)
        devices = [inputs.device] if inputs.is_cuda else []
        origins: Any = self.origin.model
        with torch.random.fork_rng(devices=devices), evaluating(strategy):
            found = tuning_contribution(model.backbone.blocks, origins.blocks, lambda: model.features(inputs), last)
        return float(found.mean())

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it; nothing where nothing is asked for."""
        return {} if self.origin is None else {"origin": dict(self.origin.state_dict()), "before": self.before}

    def load(self, state: dict[str, Any]) -> None:
        """Inverse of `state`; tensors are on the device of the run."""
        if self.origin is not None:
            self.origin.load_state_dict(state["origin"])
            self.before = state["before"]
