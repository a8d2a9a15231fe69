"""What strategies share that begin an adapter by what reaches its layer: a few samples are run through the model first.

Shapes: d inputs of a layer, n positions of a sample (tokens, patches; 1 where there are none).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clplat import Experience, require
from clplat.strategies._lora import Adapted
from clplat.strategy import evaluating


class Calibrated(Adapted):
    """Base. A frozen backbone; each experience adds an adapter of its own, which alone learns beside the head.

    Args:
        samples: of an experience, evenly spaced in its data, that are run through the model, ≥ 1.
    """

    def __init__(self, *, samples: int = 256, **base):
        super().__init__(**base)
        require("samples", samples, samples >= 1, "≥ 1")
        self.samples = samples
        self.task = -1  # follows from the experiences met

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.task += 1
        self.adapters.add(f"task{self.task}")
        self.adapters.use(*self.adapters.adapters, train=f"task{self.task}")

    @torch.no_grad()
    def _calibrate(self, experience: Experience, take: Callable[[str, Tensor], None]) -> None:
        """Call `take(layer, x)` with the inputs x (n, d) of every adapted layer, in float64.

        One sample at a time, so that texts have no padding. Every process runs all of them.
        """
        assert experience.train is not None
        size = len(experience.train)
        if not size:
            return
        rows = torch.arange(min(size, self.samples), device=experience.train.inputs.device)
        positions = rows * size // len(rows)
        raw, _ = experience.train.batch(positions)
        labels = experience.train.targets()[positions]

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, given: take(name, given[0].detach().double().flatten(0, -2))

        layers = self.adapters.base_layers()
        hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
        try:
            with evaluating(self):
                for one, label in zip(raw.split(1), labels.split(1), strict=True):
                    self.losses(self.prepare(one), label)  # features alone pass by a decoder, or CLIP's text
        finally:
            for hook in hooks:
                hook.remove()
