"""What strategies share that begin an adapter by what reaches its layer: a few samples are run through the model first.

Shapes: d inputs of a layer, n positions of a sample (tokens, patches; 1 where there are none).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from clplat import Data, Experience, require
from clplat.strategies._lora import Adapted
from clplat.strategies._once import shared
from clplat.strategy import evaluating


class Calibrated(Adapted):
    """Base. A frozen backbone; each experience adds an adapter of its own, which alone learns beside the head.

    Args:
        samples: of an experience, evenly spaced in its data, that are run through the model, ≥ 1; null takes all.
    """

    def __init__(self, *, samples: int | None = 256, **base):
        super().__init__(**base)
        require("samples", samples, samples is None or samples >= 1, "≥ 1, or null for all")
        self.samples = samples
        self.task = -1  # follows from the experiences met

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        self.task += 1
        self.adapters.add(f"task{self.task}")
        self.adapters.use(*self.adapters.adapters, train=f"task{self.task}")

    def _count(self, data: Data) -> int:
        """Samples of `data` that are run."""
        return len(data) if self.samples is None else min(len(data), self.samples)

    @torch.no_grad()
    def _calibrate(
        self, experience: Experience, take: Callable[[str, Tensor], None], chunk: int = 1, share: bool = False
    ) -> None:
        """Call `take(layer, x)` with the inputs x (n, d) of every adapted layer, in float64.

        Args:
            chunk: samples at a time; texts come one at a time, so that they have no padding.
            share: each process runs its part of the samples where it can, which `take` may sum up; else all run all.
        """
        data = experience.train
        assert data is not None
        if not len(data):
            return
        count = self._count(data)
        rows = torch.arange(count, device=data.inputs.device) * len(data) // count
        pixels = data.inputs.dtype.is_floating_point or data.inputs.dtype == torch.uint8
        parts = rows.split(chunk if pixels else 1)
        if share and shared(self):
            parts = parts[self.rank :: self.world_size]
        coming, targets = data.ahead(parts), data.targets()

        def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
            return lambda _, given: take(name, given[0].detach().double().flatten(0, -2))

        layers = self.adapters.base_layers()
        hooks = [layer.register_forward_pre_hook(note(name)) for name, layer in layers.items()]
        try:
            with evaluating(self):
                for part in parts:  # features alone pass by a decoder, or CLIP's text
                    self.losses(self.prepare(coming.batch(part)[0]), targets[part])
        finally:
            for hook in hooks:
                hook.remove()
