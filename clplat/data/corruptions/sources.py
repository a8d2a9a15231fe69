"""Where corrupted images come from: made from clean ones, or the published files; one experience's data at a time.

Shapes: n images that are taken of each segment; a sample s · n + i of a visit is image i in its s-th segment.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clplat.data.corruptions.constants import Family
from clplat.data.corruptions.data import Corrupted, Segment
from clplat.data.corruptions.order import Visit
from clplat.data.corruptions.published import (
    Blocks,
    ImageFiles,
    cifar_count,
    imagenet_files,
    imagenet_names,
    read_cifar,
)
from clplat.data.worlds import generator
from clplat.stream import Data


class Images(ABC):
    """Corrupted images of one data set.

    Args:
        labels: (n,) of the images that are taken.
    """

    labels: np.ndarray

    @abstractmethod
    def visit(self, visit: Visit, order: np.ndarray) -> Data:
        """The samples `order` (m,) of a visit, with their labels."""


def chosen_images(count: int, samples: int | None, seed: int) -> np.ndarray:
    """Which of `count` images are taken, in their order; all where `samples` is None."""
    if samples is None or samples >= count:
        return np.arange(count)
    return np.sort(generator(seed, "adapt_samples").permutation(count)[:samples])


class Made(Images):
    """Made as they are asked for.

    Args:
        clean: images (N, C, H, W) uint8 and labels (N,).
        samples: images that are taken; None takes all.
        seed: of corruptions and of what is taken.
        family: whose constants; None goes by size.
        frost_folder: with the reference's pictures of frost, or None.
    """

    def __init__(
        self, clean: tuple[Tensor, Tensor], samples: int | None, seed: int, family: Family | None,
        frost_folder: Path | None,
    ) -> None:  # fmt: skip
        self.chosen = chosen_images(len(clean[0]), samples, seed)
        self.labels = clean[1][torch.from_numpy(self.chosen)].numpy()
        folder = None if frost_folder is None else str(frost_folder)
        self._whole = Corrupted(*clean, seed=seed, family=family, frost_folder=folder)

    def visit(self, visit: Visit, order: np.ndarray) -> Data:
        n = len(self.chosen)
        rows = torch.from_numpy(order // n * len(self._whole.inputs) + self.chosen[order % n])
        return dataclasses.replace(self._whole, rows=rows, segments=visit.segments)


class Published(Images):
    """CIFAR-10-C or CIFAR-100-C, whose segments that are visited are held in memory; or ImageNet-C, read as needed.

    Args:
        folder: of the files.
        segments: that will be visited.
        samples: images that are taken; None takes all.
        seed: of what is taken.

    Raises:
        MissingError: a file is missing or damaged.
    """

    _whole: Blocks

    def __init__(self, folder: Path, segments: Sequence[Segment], samples: int | None, seed: int) -> None:
        self.names: list[str] = []  # of the files, and of their classes; ImageNet-C only
        self.classes: list[str] = []
        self._number = {segment: i for i, segment in enumerate(segments)}
        if folder.name.startswith("CIFAR"):
            chosen = chosen_images(cifar_count(folder), samples, seed)
            inputs, labels = read_cifar(folder, segments, chosen)
            self._whole = Blocks(inputs, labels, size=len(chosen))
        else:
            names, self.classes = imagenet_names(folder, segments[0])
            chosen = chosen_images(len(names), samples, seed)
            self.names = [names[i] for i in chosen]
            paths, labels = imagenet_files(folder, segments, self.names, self.classes)
            self._whole = ImageFiles(torch.arange(len(paths)), labels, size=len(chosen), paths=paths)
        self.labels = labels[: len(chosen)].numpy()

    def visit(self, visit: Visit, order: np.ndarray) -> Data:
        n = len(self.labels)
        block = np.array([self._number[s] for s in visit.segments])[order // n]
        names = tuple(name for name, _ in self._number) if len(visit.segments) > 1 else ()
        return dataclasses.replace(self._whole, rows=torch.from_numpy(block * n + order % n), blocks=names)

    def clean_files(self, folder: Path) -> Data | None:
        """The same images of ImageNet before corruption, where `<folder>/<class>/<file>` holds them all."""
        paths = tuple(folder / name for name in self.names)
        if not all(p.is_file() for p in paths):
            return None
        return ImageFiles(torch.arange(len(paths)), torch.from_numpy(self.labels), paths=paths)
