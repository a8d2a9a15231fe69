"""Small data sets of pictures in files of their own, and of arrays in .npy files; streams that stay there."""

from __future__ import annotations

import tarfile
from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from clplat.inputs import Inputs


def write_pictures(root: Path, *, side: int = 12, classes: int = 4, train: int = 12, test: int = 4) -> Path:
    """JPEGs in train/<class>/ and test/<class>/: bright in a quarter that the class names, noise elsewhere."""
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("test", test)):
        for c in range(classes):
            folder = root / part / str(c)
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (side, side, 3), dtype=np.uint8)
                half = side // 2
                pixels[c // 2 * half :][:half, c % 2 * half :][:, :half] += 120
                Image.fromarray(pixels).save(folder / f"{i}.jpg", quality=95)
    return root


def write_arrays(root: Path, inputs: np.ndarray, labels: np.ndarray) -> Path:
    """The first two thirds to train on, the others to test on."""
    root.mkdir(parents=True, exist_ok=True)
    cut = len(inputs) * 2 // 3
    for part, rows in (("train", slice(cut)), ("test", slice(cut, None))):
        np.save(root / f"{part}_inputs.npy", inputs[rows])
        np.save(root / f"{part}_labels.npy", labels[rows])
    return root


def write_tars(root: Path, pictures: Path) -> Path:
    """The pictures of a folder of parts in two .tar files a part, each picture with its class."""
    for part in ("train", "test"):
        (root / part).mkdir(parents=True)
        for k in (0, 1):
            with tarfile.open(root / part / f"{k}.tar", "w") as archive:
                for file in sorted((pictures / part).glob("*/*.jpg"))[k::2]:
                    key = f"s/{file.parent.name}-{file.stem}"
                    add(archive, f"{key}.jpg", file.read_bytes())
                    add(archive, f"{key}.cls", file.parent.name.encode())
    return root


def add(archive: tarfile.TarFile, name: str, content: bytes) -> None:
    """Put a member into a tar file."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    archive.addfile(member, BytesIO(content))


def same(one, other) -> None:
    """Two streams hold the same, one of them on disk."""
    assert (one.input_shape, one.class_names, one.normalize) == (other.input_shape, other.class_names, other.normalize)
    assert one.preprocessing() == other.preprocessing()
    for e, f in zip(one, other, strict=True):
        for a, b in ((e.train, f.train), (e.test, f.test)):
            assert isinstance(a.inputs, Inputs)
            assert a.inputs.dtype == b.inputs.dtype
            assert not a.inputs.span or a.inputs.span[0] <= b.inputs.min() <= b.inputs.max() <= a.inputs.span[1]
            (x, y), (z, w) = a.all(), b.all()
            assert torch.equal(x, z)
            assert torch.equal(y, w)
