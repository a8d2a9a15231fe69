"""The published files: CIFAR-10-C, CIFAR-100-C and ImageNet-C as their authors released them.

    <data root>/CIFAR-10-C/<corruption>.npy       uint8 (50000, 32, 32, 3), severity s in rows (s − 1) · 10000 and on
    <data root>/CIFAR-10-C/labels.npy             (50000,)
    <data root>/ImageNet-C/<corruption>/<severity>/<class>/*.JPEG        224 × 224
    <data root>/ImageNet-C/imagenet_test_image_ids.txt                   optional: <class>/<file> a line, in order
    <data root>/imagenet/val/<class>/*.JPEG                              optional: clean images

Zenodo 2535967, 3555552 and 2235448. Published error rates hold for these files only: those made by `corrupt` have the
same distributions and other draws.

Shapes: n images of a segment, S segments; row s · n + i is image i in segment s.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.corruptions.data import Segment
from clplat.data.pictures import as_bytes, cropped, read_picture
from clplat.errors import MissingError
from clplat.stream import Data

FOLDERS = {"cifar10": "CIFAR-10-C", "cifar100": "CIFAR-100-C", "imagenet": "ImageNet-C"}
IDS = "imagenet_test_image_ids.txt"
SEVERITIES = 5


@dataclass(frozen=True, eq=False)
class Blocks(Data):
    """Data whose inputs are blocks of rows, one after the other; scored by block where an experience mixes several.

    Args:
        blocks: name of each block; those of one name are scored together. Empty: not scored apart.
        size: rows of a block.
    """

    blocks: tuple[str, ...] = ()
    size: int = 1

    def part_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.blocks))

    def parts(self, rows: Tensor) -> Tensor:
        names = self.part_names()
        return torch.tensor([names.index(b) for b in self.blocks], device=rows.device)[rows // self.size]


@dataclass(frozen=True, eq=False)
class ImageFiles(Blocks):
    """Images read from their files when a batch is asked for; `inputs` (N,) int64 only counts them.

    Args:
        paths: of all N images.
        side: pixels of a side, `cropped`.
    """

    paths: tuple[Path, ...] = ()
    side: int = 224

    def batch(self, positions: Tensor | slice) -> tuple[Tensor, Tensor | None]:
        rows: Any = positions if self.rows is None else self.rows[positions]
        with ThreadPoolExecutor(8) as pool:
            images = list(pool.map(self._read, rows.tolist()))
        shape = (0, 3, self.side, self.side)
        stacked = torch.stack(images) if images else torch.empty(shape, dtype=torch.uint8)
        return stacked.to(self.inputs.device), None if self.labels is None else self.labels[rows]

    def _read(self, row: int) -> Tensor:
        path = self.paths[row]
        return as_bytes(read_picture(path, fit=cropped(self.side)), str(path))


def read_cifar(folder: Path, segments: Sequence[Segment], chosen: np.ndarray) -> tuple[Tensor, Tensor]:
    """Images (S n, 3, 32, 32) uint8 and labels (S n,) of the segments.

    Args:
        chosen: (n,) test images that are taken, in order.

    Raises:
        MissingError: a file is missing or has another shape; says what to put where.
    """
    labels = _array(folder / "labels.npy")
    count = len(labels) // SEVERITIES
    images = []
    for name, severity in segments:
        whole = _array(folder / f"{name}.npy")
        if whole.dtype != np.uint8 or whole.shape[1:] != (32, 32, 3) or len(whole) != len(labels):
            shape = f"{whole.dtype} {whole.shape}"
            raise MissingError(
                f"{folder / name}.npy holds {shape}: replace it by uint8 ({len(labels)}, 32, 32, 3), one "
                "severity after the other"
            )
        images.append(torch.from_numpy(whole[(severity - 1) * count + chosen]).permute(0, 3, 1, 2).contiguous())
    named = np.concatenate([labels[(severity - 1) * count + chosen] for _, severity in segments])
    return torch.cat(images), torch.from_numpy(named.astype(np.int64))


def cifar_count(folder: Path) -> int:
    """Test images that the files hold at each severity."""
    return len(_array(folder / "labels.npy")) // SEVERITIES


def _array(path: Path) -> np.ndarray:
    """Mapped, not read; nothing unpickled."""
    try:
        return np.load(path, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        where = "as Zenodo 2535967 (CIFAR-10-C) and 3555552 (CIFAR-100-C) have it"
        raise MissingError(f"stream.published: {path} is missing: put it there, {where}") from None
    except (OSError, ValueError, EOFError) as error:
        raise MissingError(f"{path} can't be read ({error}): replace it by a whole .npy file") from error


def imagenet_names(folder: Path, segment: Segment) -> tuple[list[str], list[str]]:
    """<class>/<file> of every image, in the order of the list of ids where there is one, else sorted; and the classes.

    Raises:
        MissingError: the folder of a corruption is missing or empty.
    """
    listed, place = folder / IDS, folder / segment[0] / str(segment[1])
    found = sorted(p for p in place.glob("*/*") if p.suffix.lower() in (".jpeg", ".jpg", ".png"))
    if not found:
        raise MissingError(
            f"stream.published: {place} is missing or empty: put <class>/<file>.JPEG there, as Zenodo 2235448 "
            "(ImageNet-C) has it"
        )
    names = [f"{p.parent.name}/{p.name}" for p in found]
    if listed.is_file():
        names = ["/".join(line.split("/")[-2:]) for line in listed.read_text().split()]
    return names, sorted({p.parent.name for p in found})


def imagenet_files(
    folder: Path, segments: Sequence[Segment], names: Sequence[str], classes: Sequence[str]
) -> tuple[tuple[Path, ...], Tensor]:
    """Paths of the images `names` in every segment, and their labels (S n,): positions in `classes`.

    Raises:
        MissingError: a file is missing; says which.
    """
    number = {c: i for i, c in enumerate(classes)}
    paths = tuple(folder / name / str(severity) / image for name, severity in segments for image in names)
    absent = next((p for p in paths if not p.is_file()), None)
    if absent is not None:
        raise MissingError(
            f"stream.published: {absent} is missing: put it there, as Zenodo 2235448 (ImageNet-C) has it"
        )
    labels = torch.tensor([number[name.split("/")[0]] for name in names])
    return paths, labels.repeat(len(segments))
