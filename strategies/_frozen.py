"""What strategies share that learn by sums over the features of a frozen backbone, each sample once."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from clplat import Experience, Kind, Strategy, require
from clplat.components.frozen import frozen_features
from clplat.components.sums import Sums


class Summing(Strategy):
    """Base. A subclass names its sums, takes features into them and finds its classifier from them.

    Args:
        chunk: samples that the backbone is run on at a time, ≥ 1, raised to a multiple of 16. Always so many, so that
            features do not depend on the batch.
    """

    kinds = frozenset({Kind.LEARN})
    searched = {"lr": None}
    needs_classes = True
    frozen_features = True
    unmergeable = "its classifier is solved from sums of features"
    left: Tensor
    whole: Tensor

    def __init__(self, *, chunk: int = 32, **base):
        super().__init__(**base)
        require("chunk", chunk, chunk >= 1, "≥ 1")
        self.chunk = chunk
        self.model.requires_grad_(False)
        self.register_buffer("left", torch.zeros((), dtype=torch.int64))  # samples of the experience still to come
        self.register_buffer("whole", torch.ones((), dtype=torch.bool))  # no experience was cut short

    def _open(self) -> Sequence[Sums]:
        """The sums that samples are added to."""
        raise NotImplementedError

    def _take(self, features: Tensor, labels: Tensor) -> None:
        """Add samples of this process: features (B, k), labels (B,)."""
        raise NotImplementedError

    def _solve(self) -> None:
        """Find the classifier; the sums are those of all processes."""

    def grow(self, experience: Experience) -> None:
        super().grow(experience)
        for sums in self._open():
            sums.grow(max(experience.classes, default=-1) + 1)

    def begin(self, experience: Experience) -> None:
        self.left.fill_(len(self.training_data(experience)))
        for sums in self._open():
            sums.open()

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        x, y = batch  # (B, ...), (B,)
        if self.left > 0:  # later epochs bring nothing new
            self._take(frozen_features(self.model, x, self.chunk), y)
            self.left -= self.global_batch

    def end(self, experience: Experience) -> None:
        self.whole &= self.left <= 0
        for sums in self._open():
            sums.gather()
        self._solve()

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        for sums in self._open():
            sums.merge()
