"""Reading labelled image sets from the data root: plain NumPy archives, nothing unpickled.

A set is `<data root>/<name>/train.npz` and `test.npz`, each with `images` uint8 (N, H, W), (N, H, W, 3) or
(N, 3, H, W), and integer `labels` (N,); some have further arrays, such as `coarse` (N,) labels and `domain` (N,) ids.
Where they are not there, the files that torchvision keeps (its own folder names) are read instead.

Shapes: N samples of a data set, C channels, H rows, W columns.
"""

from __future__ import annotations

import io
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.arrays import channel_axis
from clplat.data.pictures import channels_first
from clplat.errors import MissingError

# Sets that torchvision reads too: its class, and where it keeps its files below the data root.
TORCHVISION = {
    "mnist": ("MNIST", "MNIST/raw"),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw"),
    "cifar10": ("CIFAR10", "cifar-10-batches-py"),
    "cifar100": ("CIFAR100", "cifar-100-python"),
    "svhn": ("SVHN", "train_32x32.mat"),
}
OMNIGLOT_ZIPS = ("images_background_small1.zip", "images_background_small2.zip")
OMNIGLOT_TRAIN_DRAWERS = 15  # of the 20 who drew each character
LAYOUT = "images uint8 (N, H, W) or (N, H, W, 3), labels int64 (N,)"
_ROOT: ContextVar[str | None] = ContextVar("data_root", default=None)  # of the configuration that is being built
# How many classes the sets have, as far as it is the same everywhere.
CLASSES = {**dict.fromkeys(("mnist", "fashion_mnist", "notmnist", "cifar10", "svhn"), 10), "cifar100": 100, "pacs32": 7}


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Images (N, C, H, W), labels (N,) int64, and what else the set has: arrays (N,) by name.

    Args:
        images: a tensor, or `Inputs` of pictures that stay in their files.
    """

    images: Any
    labels: Tensor
    extra: dict[str, Tensor]


@contextmanager
def in_root(data_root: str | None) -> Iterator[None]:
    """What is built within, and isn't told the data root, takes this one: weights, tokenizers, kept features."""
    token = _ROOT.set(data_root)
    try:
        yield
    finally:
        _ROOT.reset(token)


def find_root(data_root: str | None) -> Path | None:
    """The data root: as given, else that of the configuration that is being built, else $CLPLAT_DATA, else None."""
    root = data_root or _ROOT.get() or os.environ.get("CLPLAT_DATA")
    return Path(root).expanduser() if root else None


def find_path(path: str, data_root: str | None) -> Path:
    """`path` in the working directory, or else in the data root."""
    file, root = Path(path).expanduser(), find_root(data_root)
    return root / file if root is not None and not file.exists() else file


def load_images(name: str, data_root: str | None, download: bool = False) -> tuple[ImageSet, ImageSet]:
    """Training and test part of a set.

    Args:
        name: of the set; see the module's head for its files.
        data_root: folder of data sets; None takes $CLPLAT_DATA.
        download: let torchvision fetch what is missing into the data root.

    Raises:
        MissingError: no data root, or no file, or one that can't be read; says what to put where.
    """
    root = find_root(data_root)
    if root is None:
        raise MissingError(
            f"data_root: not set, and so there is no {name}: give --data_root DIR, or set CLPLAT_DATA, to the folder "
            f"that holds {name}/train.npz and {name}/test.npz ({LAYOUT})"
        )
    if name == "omniglot":
        return _omniglot(root / name)
    train, test = root / name / "train.npz", root / name / "test.npz"
    if train.is_file() and test.is_file():
        return _read_set(train, name), _read_set(test, name)
    if name == "notmnist" and test.is_file():
        return _split_of_one(_read_set(test, name))
    if name in TORCHVISION and (download or (root / TORCHVISION[name][1]).exists()):
        return _torchvision(name, root, download, "train"), _torchvision(name, root, download, "test")
    missing = next(p for p in (train, test) if not p.is_file())
    message = (
        f"stream.dataset: {name} is missing: put {missing} there ({LAYOUT}); --data_root or CLPLAT_DATA name the root"
    )
    if name in TORCHVISION:
        message += f"; or torchvision's own {root / TORCHVISION[name][1]}, which --stream.download true fetches"
    raise MissingError(message)


def read_npz(path: Path, required: tuple[str, ...] = ()) -> dict[str, np.ndarray]:
    """All arrays of an archive, without unpickling.

    Raises:
        MissingError: no such file, not an archive, cut short, an array of Python objects, or a required one missing.
    """
    try:
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise ValueError("not an .npz archive")
            arrays = {key: archive[key] for key in archive.files}
    except FileNotFoundError:
        raise MissingError(f"{path} is missing: put it there, or name another path") from None
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        raise MissingError(f"{path} can't be read ({error}): replace it by a whole .npz file") from error
    absent = [key for key in required if key not in arrays]
    if absent:
        raise MissingError(f"{path} lacks {', '.join(absent)} (it has: {', '.join(sorted(arrays)) or 'nothing'})")
    return arrays


def stratified_split(labels: np.ndarray, *, test_share: float, random_state: int) -> tuple[np.ndarray, np.ndarray]:
    """Rows of the training and the test part of `labels` (N,), both shuffled, each class in proportion.

    The rows are those of scikit-learn's train_test_split(test_size=test_share, stratify=labels,
    random_state=random_state), drawn in the same way (StratifiedShuffleSplit, BSD-3), without its import time.

    Args:
        test_share: in (0, 1); the test part is rounded up.
    """
    draw = np.random.RandomState(random_state)  # what scikit-learn draws from
    _, numbers, counts = np.unique(labels, return_inverse=True, return_counts=True)
    test_count = int(np.ceil(test_share * len(labels)))
    by_class = np.split(np.argsort(numbers, kind="stable"), np.cumsum(counts)[:-1])
    train_counts = _proportional(counts, len(labels) - test_count, draw)
    test_counts = _proportional(counts - train_counts, test_count, draw)
    train, test = [], []
    for rows, a, b in zip(by_class, train_counts, test_counts, strict=True):
        shuffled = rows[draw.permutation(len(rows))]
        train.append(shuffled[:a])
        test.append(shuffled[a : a + b])
    return draw.permutation(np.concatenate(train)), draw.permutation(np.concatenate(test))


def _proportional(counts: np.ndarray, total: int, draw: np.random.RandomState) -> np.ndarray:
    """How many of `total` samples each class gets: rounded down, the rest by largest remainder, ties drawn."""
    exact = counts / counts.sum() * total
    given = np.floor(exact)
    left = int(total - given.sum())
    remainders = exact - given
    for value in np.unique(remainders)[::-1]:
        if left == 0:
            break
        tied = np.flatnonzero(remainders == value)
        chosen = draw.choice(tied, size=min(len(tied), left), replace=False)
        given[chosen] += 1
        left -= len(chosen)
    return given.astype(np.int64)


def _read_set(path: Path, name: str) -> ImageSet:
    arrays = read_npz(path, ("images", "labels"))
    images, labels = arrays.pop("images"), arrays.pop("labels")
    fits = images.dtype == np.uint8 and images.ndim in (3, 4) and labels.shape == (len(images),)
    if images.ndim == 4 and channel_axis(images.shape) == 1:
        images = images.transpose(0, 2, 3, 1)
    if not fits or not np.issubdtype(labels.dtype, np.integer) or images.shape[3:] not in ((), (1,), (3,)):
        raise MissingError(
            f"{path} has images {images.dtype} {images.shape} and labels {labels.dtype} {labels.shape}: replace it by "
            f"one with {LAYOUT}"
        )
    if len(labels) and not 0 <= labels.min() <= labels.max() < CLASSES.get(name, np.inf):
        valid = f"0 to {CLASSES[name] - 1}" if name in CLASSES else "≥ 0"
        raise MissingError(
            f"{path} has labels from {labels.min()} to {labels.max()}: replace it by one whose labels are those of "
            f"{name} ({valid})"
        )
    extra = {
        k: torch.from_numpy(v.astype(np.int64))
        for k, v in arrays.items()
        if v.shape == labels.shape and np.issubdtype(v.dtype, np.integer)
    }
    return ImageSet(channels_first(images), torch.from_numpy(labels.astype(np.int64)), extra)


def _split_of_one(whole: ImageSet) -> tuple[ImageSet, ImageSet]:
    """notMNIST is often had in one part only; a fifth of each class, always the same samples, is held out then."""
    train, test = stratified_split(whole.labels.numpy(), test_share=0.2, random_state=0)
    return ImageSet(whole.images[train], whole.labels[train], {}), ImageSet(whole.images[test], whole.labels[test], {})


def _omniglot(folder: Path) -> tuple[ImageSet, ImageSet]:
    """28x28, strokes bright; a class is a character, in order of alphabet; drawers 1 to 15 train, 16 to 20 test."""
    from PIL import Image

    drawings: dict[tuple[str, int], np.ndarray] = {}  # (alphabet/character, drawer); Greek and Latin are in both zips
    for name in OMNIGLOT_ZIPS:
        path = folder / name
        if not path.is_file():
            raise MissingError(
                f"stream.dataset: omniglot is missing: put {path} there (as github.com/brendenlake/omniglot has it, "
                f"folder python); --data_root or CLPLAT_DATA name the root"
            )
        try:
            with zipfile.ZipFile(path) as archive:
                for member in archive.namelist():
                    if member.endswith(".png"):
                        _, alphabet, character, file = member.split("/")
                        with Image.open(io.BytesIO(archive.read(member))) as image:
                            small = np.asarray(image.convert("L").resize((28, 28), Image.Resampling.BOX))
                        drawer = int(Path(file).stem.rpartition("_")[2])
                        drawings[f"{alphabet}/{character}", drawer] = 255 - small
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise MissingError(f"{path} can't be read ({error}): replace it by a whole file") from error
    number = {character: i for i, character in enumerate(sorted({c for c, _ in drawings}))}
    parts = []
    for in_train in (True, False):
        keys = [k for k in sorted(drawings) if (k[1] <= OMNIGLOT_TRAIN_DRAWERS) == in_train]
        images = channels_first(np.stack([drawings[k] for k in keys]))
        parts.append(ImageSet(images, torch.tensor([number[c] for c, _ in keys]), {}))
    return parts[0], parts[1]


def _torchvision(name: str, root: Path, download: bool, split: str) -> ImageSet:
    """As torchvision reads it. Of the CIFAR sets it unpickles files, after checking the md5 of each official one."""
    import torchvision.datasets

    cls = getattr(torchvision.datasets, TORCHVISION[name][0])
    which = {"split": split} if name == "svhn" else {"train": split == "train"}
    try:
        data = cls(root=str(root), download=download, **which)
    except (OSError, RuntimeError) as error:
        where = root / TORCHVISION[name][1]
        raise MissingError(f"stream.dataset: {name} {split} could not be had from {where} ({error})") from error
    images, labels = np.asarray(data.data), np.asarray(data.labels if name == "svhn" else data.targets)
    stacked = torch.from_numpy(images) if name == "svhn" else channels_first(images)
    return ImageSet(stacked, torch.from_numpy(labels.astype(np.int64)), {})
