"""What strategies share that augment at test time, and those of them in which a slow copy of the model predicts."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from clplat import Experience, Frozen
from clplat.components.augment import draw, in_turns
from clplat.strategies._stepping import Stepping
from clplat.strategies._tta import mended


class Augmenting(Stepping):
    """Base of those that augment images in [0, 1]."""

    changes_images = True
    seed: Tensor

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self._met = False  # an input
        self.register_buffer("seed", torch.randint(2**31, ()))  # equal on all processes, which were seeded alike

    def adapt_step(self, inputs: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        if not self._met and inputs.numel():
            self._met = True  # once: looking makes a GPU wait
            low, high = (float(end) for end in mended(inputs).aminmax())
            if self.rank == 0 and (low < -1e-3 or high > 1 + 1e-3):
                warnings.warn(
                    f"{type(self).__name__}: inputs reach from {low:.3g} to {high:.3g}, and augmentations cut off what "
                    "is outside [0, 1]: normalise in the model (backbone.normalize), not in the stream",
                    stacklevel=2,
                )
        return super().adapt_step(inputs)

    def _augmented(self, x: Tensor) -> Tensor:
        """A(x), the same augmentation for all images of the batch, on every process; drawn anew for each of them.

        `kept` counts the batches.
        """
        generator = torch.Generator(self.seed.device)
        generator.manual_seed(int(self.seed) * 1_000_003 + self.kept["batches"])
        draws = draw(1, x.shape[-2], x.shape[-1], generator)
        (part,) = in_turns(x, draws, generator, None, (self._whole(x), self.rank, self.world_size))
        return part[0]


class Taught(Augmenting):
    """Base of those in which a slow copy of the model, the teacher, predicts, in evaluation as well.

    A subclass makes `teacher`, and moves it after each step.
    """

    source: Frozen  # the model before the first batch
    teacher: Frozen

    def __init__(self, **base: Any) -> None:
        super().__init__(**base)
        self.source = Frozen(self.model)

    def _take_source(self) -> None:
        self.source.take(self.model)
        self.teacher.take(self.model)

    def _restore_source(self) -> None:
        self.source.copy_to(self.model)
        self.teacher.take(self.source.model)

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        if self.adapting:
            self.source.grow(self.model)
            self.teacher.grow(self.model)

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        if not self.adapting:
            return super().predict(inputs, task)
        model: Any = self.teacher.model
        return getattr(model, "predict", model)(inputs, task)
