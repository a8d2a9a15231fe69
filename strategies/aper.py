"""APER: a backbone adapted to the first experience beside the one it was, and class prototypes of both their features.

Source   Zhou et al., "Revisiting Class-Incremental Learning with Pre-Trained Models: Generalizability and Adaptivity
         are All You Need", IJCV 2024, arXiv:2303.07338.
Checked  by reading LAMDA-CL/LAMDA-PILOT models/aper_adapter.py (5240714), which was not run.
    first experience: loss = CE(f(x; A, B), y);  then everything is frozen
    φ(x) = [φ_0(x), φ_1(x)],   p_c = 1/n_c Σ_{y=c} φ(x),   prediction argmax_c cos(φ(x), p_c)
    φ_0 the features without the adapter, φ_1 those with it
Differs  the adapter is LoRA (theirs: AdaptFormer, SSF, VPT, or all weights), under the head that the run has (theirs a
         cosine one: `head: cosine`). Prototypes are made at the end of an experience, in one pass over its data without
         augmentation, as sums in float64 over all samples of a class wherever they come (theirs replaces the prototype
         of a class that comes again). While the first experience lasts, the head predicts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from clplat import Experience, require
from clplat.components.prototypes import Prototypes
from clplat.strategies._lora import Adapted
from clplat.strategies._once import once, shared


class APER(Adapted):
    """Adapt and merge. Shapes: B samples of a batch, D features, C classes.

    Args:
        chunk: samples that prototypes are made from at a time, ≥ 1.
    """

    paper = "arXiv:2303.07338"
    unshardable = ""
    unmergeable = "it trains in its first experience alone, and keeps the pretrained weights beside it"
    needs_classes = True
    adapted: Tensor

    def __init__(self, *, chunk: int = 32, **base):
        super().__init__(**base)
        require("chunk", chunk, chunk >= 1, "≥ 1")
        backbone: Any = self.model.backbone
        self.chunk, self.prototypes = chunk, Prototypes(2 * backbone.embed_dim)
        self.register_buffer("adapted", torch.zeros((), dtype=torch.bool))  # the first experience is over

    def grow(self, experience: Experience) -> None:
        first = not self.adapters.adapters
        super().grow(experience)
        self.prototypes.grow(max(experience.classes, default=-1) + 1)
        if first:
            self.adapters.add("first")
            self.adapters.use("first", train="first")
        else:
            self.adapters.use("first")
            self.model.requires_grad_(False)

    def training_step(  # type: ignore[override]  # no loss after the first experience
        self, batch: tuple[Tensor, Tensor], batch_idx: int
    ) -> Tensor | None:
        return None if self.adapted else super().training_step(batch, batch_idx)

    @torch.no_grad()
    def end(self, experience: Experience) -> None:
        self.adapted.fill_(True)
        self.prototypes.open(shared(self))
        for x, y in once(self, self.training_data(experience), self.chunk):
            self.prototypes.add(self._both(x), y)
        self.prototypes.gather()

    def predict(self, inputs: Tensor, task: int | None = None) -> Tensor:
        return self.prototypes(self._both(inputs)) if self.adapted else super().predict(inputs, task)  # (B, C)

    def _both(self, inputs: Tensor) -> Tensor:
        """Features (B, 2D) without and with the adapter."""
        with self.adapters.using():
            before = self.model.features(inputs)
        return torch.cat([before, self.model.features(inputs)], dim=1)
