"""Corrupted data: clean images held once, corrupted a batch at a time as they are asked for.

Shapes: N clean images, S segments, n samples of an experience, B of a batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from clplat.data.corruptions import corrupt
from clplat.data.corruptions.constants import Family
from clplat.stream import Data

Segment = tuple[str, int]  # corruption, severity


@dataclass(frozen=True, eq=False)
class Corrupted(Data):
    """Samples of corrupted images. Row s · N + i is image i in segment s; nothing but clean images is stored.

    A batch is a function of its rows, whatever batch, round or process asks for it (see `corruptions.draws`).

    Args:
        inputs: (N, C, H, W) uint8 clean images.
        labels: (N,) of the images, or None.
        rows: (n,) int64 in [0, S N).
        segments: (corruption, severity) of each; severity 0 is clean.
        seed: of what is random in the corruptions.
        family: whose constants; None goes by size.
        frost_folder: with the reference's pictures of frost, or None.
    """

    segments: tuple[Segment, ...] = ()
    seed: int = 0
    family: Family | None = None
    frost_folder: str | None = None

    def batch(self, positions: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        segment, image = self._split(positions)
        clean = self.inputs[image]
        made = torch.empty_like(clean)
        for number in segment.unique().tolist():
            where = (segment == number).nonzero().squeeze(1)
            name, severity = self.segments[number]
            options = {"seed": self.seed, "family": self.family, "frost_folder": self.frost_folder}
            made[where] = corrupt(clean[where], name, severity, indices=image[where], **options)  # type: ignore[arg-type]
        return made, None if self.labels is None else self.labels[image]

    def targets(self) -> Tensor:
        if self.labels is None:
            raise ValueError("these data carry no labels")
        return self.labels[self._split(torch.arange(len(self), device=self.inputs.device))[1]]

    def part_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in self.segments)) if len(self.segments) > 1 else ()

    def parts(self, rows: Tensor) -> Tensor:
        numbers = [self.part_names().index(name) for name, _ in self.segments]
        return torch.tensor(numbers, device=rows.device)[rows // len(self.inputs)]

    def _split(self, positions: Tensor | slice) -> tuple[Tensor, Tensor]:
        """Segment and image of the samples at `positions` (B,)."""
        assert self.rows is not None
        rows = self.rows[positions]
        return rows // len(self.inputs), rows % len(self.inputs)
