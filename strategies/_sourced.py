"""What test-time adaptation strategies share that go on seeing source images: a memory of those that were learned.

Shapes: C classes, D features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat import Experience, Kind, require
from clplat.components.memory import ClassBalanced
from clplat.components.norms import set_statistics
from clplat.errors import UserError
from clplat.strategies._taught import Taught
from clplat.strategies._tta import mended
from clplat.strategy import evaluating

CHUNK = 64  # images at a time that prototypes are made from


class Sourced(Taught):
    """Base of those that keep source images. A subclass names in `needing` the options that need them.

    Args:
        memory: source images that are kept of the learn experiences, the same number of each class, ≥ 1.
        source_batch: of them in a step, over all processes, ≥ 1; fewer where fewer are kept.
    """

    replays = True
    prototypes: Tensor
    needing: tuple[str, ...] = ()

    def __init__(self, *, memory: int = 2000, source_batch: int = 200, **base: Any) -> None:
        super().__init__(**base)
        require("source_batch", source_batch, source_batch >= 1, "≥ 1")
        self.memory, self.source_batch = ClassBalanced(memory), source_batch
        backbone: Any = self.model.backbone
        if not backbone.needs_head:
            what = f"{type(backbone).__name__} answers in words, and it is features beside a head that are compared"
            raise UserError(f"backbone: {what} (valid: resnet, vit, timm, ...)")
        classes: Any = self.model.num_classes
        self.register_buffer("prototypes", torch.zeros(classes, backbone.embed_dim))  # (C, D); 0 without an image

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        for name in self.needing:
            if self.adapting and getattr(self, name) and not len(self.memory):
                raise UserError(
                    f"strategy.{name}: {getattr(self, name)} needs source images, which the stream does not give (let "
                    "a learn experience come first, or set 0)"
                )
        if self._entering and len(self.memory):
            self._take_prototypes()

    def end(self, experience: Experience) -> None:
        super().end(experience)
        if experience.kind is Kind.LEARN and experience.train is not None:
            self.memory.fill(experience.train)

    def _drawn(self) -> tuple[Tensor, Tensor, float]:
        """This process's part of the source images of a step, their labels, and the factor that makes a sum of their
        losses what `mean` gives."""
        raw, labels, *_ = self.memory.sample_distinct(self.source_batch)
        with evaluating(self):  # not augmented
            images = mended(self.prepare(raw))
        return images, labels, self.world_size / min(self.source_batch, len(self.memory))

    @torch.no_grad()
    def _take_prototypes(self) -> None:
        """Means of the features of what the memory holds, by the model as it is, on every process."""
        raw, labels, *_ = self.memory.everything()
        model: Any = self.model
        set_statistics(model, None)
        with evaluating(self):
            found = torch.cat([model.features(mended(self.prepare(part))) for part in raw.split(CHUNK)])
        set_statistics(model, self.statistics, self.share)
        for c in labels.unique().tolist():
            self.prototypes[c] = found[labels == c].mean(0)
