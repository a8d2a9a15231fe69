"""Data that stay on disk: memory with 100,000 pictures next to 1,000, and batches a second next to torch's DataLoader.

Pictures are 224 pixels wide. JPEGs are links to a few files, so that folders of any size are cheap; in Arrow files they
are whole. The array in an .npy file is sparse, and reading it takes the memory that reading a full one takes. Each run
is a process of its own: its high-water mark is the kernel's. The DataLoader decodes with the same function, in as many
processes as clplat has threads.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.memory import peak_mb
from benchmarks.timing import Row, paired

SIDE, FEW, MANY, TEST, MODELS = 224, 1_000, 100_000, 10, 50  # MODELS: files that the pictures of a folder are links to
BATCH, WORKERS, LIMIT_MB, LIMIT_RATIO = 64, 2, 300.0, 1 / 0.95
STEPS = 20  # of each run whose memory is measured: more than fill what is read ahead


def write_models(root: Path) -> list[Path]:
    """The folder, with the files of pictures that differ."""
    from PIL import Image

    rng, models = np.random.default_rng(0), []
    root.mkdir()
    for k in range(MODELS):
        coarse = Image.fromarray(rng.integers(0, 256, (28, 28, 3), dtype=np.uint8))
        models.append(root / f".{k}.jpg")
        coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(models[-1], quality=90)
    return models


def write_folder(root: Path, count: int) -> Path:
    """train/ of `count` pictures of 10 classes, test/ of 10."""
    models = write_models(root)
    for part, size in (("train", count), ("test", TEST)):
        for c in range(10):
            (root / part / str(c)).mkdir(parents=True)
        for k in range(size):
            os.link(models[k % MODELS], root / part / str(k % 10) / f"{k}.jpg")
    return root


def write_arrow(root: Path, count: int) -> Path:
    """The same as the package `datasets` saves it."""
    import datasets

    datasets.disable_progress_bars()
    held = [{"bytes": file.read_bytes(), "path": None} for file in write_models(root)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.Value("int64")})

    def rows(size: int) -> Iterator[dict[str, Any]]:
        for k in range(size):
            yield {"image": held[k % MODELS], "label": k % 10}

    parts = datasets.DatasetDict()
    for part, size in (("train", count), ("test", TEST)):
        options = {"cache_dir": str(root / "made"), "gen_kwargs": {"size": size}}
        parts[part] = datasets.Dataset.from_generator(rows, features, **options)
    parts.save_to_disk(str(root / "saved"))
    del parts
    shutil.rmtree(root / "made")
    return root / "saved"


def write_arrays(root: Path, count: int) -> Path:
    """train_inputs.npy of `count` pictures, sparse but for the first, which holds 0 and 255; test_inputs.npy of 10."""
    root.mkdir()
    for part, size in (("train", count), ("test", TEST)):
        held = np.lib.format.open_memmap(root / f"{part}_inputs.npy", "w+", np.uint8, (size, 3, SIDE, SIDE))
        held[0, :, ::2] = 255
        np.save(root / f"{part}_labels.npy", np.arange(size) % 10)
    return root


def command(stream: str, path: Path, output: str, in_memory: bool = False) -> list[str]:
    """A run over the data, without a pass that the DataLoader has no part in."""
    place = "stream.dataset" if stream == "huggingface" else "stream.path"
    options = {place: path, "stream.in_memory": in_memory, "stream.workers": WORKERS, "stream.experiences": 1,
               "loop.batch_size": BATCH, "loop.max_steps": STEPS, "loop.representation": False, "output": output,
               "tracking.enabled": False, "backbone.hidden": "[16]"}  # fmt: skip
    options |= {"images": {"stream.normalize": "imagenet"}, "arrays": {"stream.scale": 255}}.get(stream, {})
    flags = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    return [
        sys.executable,
        "-m",
        "clplat",
        "run",
        "--strategy",
        "naive",
        "--backbone",
        "mlp",
        "--stream",
        stream,
        *flags,
    ]


def memory(quick: bool) -> list[Row]:
    """Peak of the process with many pictures, next to few."""
    found, many = [], 10 * FEW if quick else MANY
    for stream, write in (("images", write_folder), ("huggingface", write_arrow), ("arrays", write_arrays)):
        peaks: dict[int, list[float]] = {FEW: [], many: []}
        with tempfile.TemporaryDirectory() as folder:
            os.environ["CLPLAT_CACHE"] = f"{folder}/cache"
            for count in peaks:
                path = write(Path(folder) / str(count), count)
                for _ in range(1 if quick else 3):
                    peaks[count].append(peak_mb(command(stream, path, f"{folder}/runs"))[0])
        name = f"peak memory, {many} pictures of {SIDE} pixels next to {FEW}: {stream}"
        found.append(paired(name, "MB", peaks[many], peaks[FEW], "difference", LIMIT_MB))
    return found


def seconds(loader: str, path: Path, batches: int) -> float:
    """From the first batch to the last but for the first, in a process of its own."""
    code = f"from benchmarks.on_disk import {loader}; {loader}({str(path)!r}, {batches})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def _timed(batches: Any) -> None:
    next(batches)
    started = time.perf_counter()
    for batch in batches:
        assert batch.shape == (BATCH, 3, SIDE, SIDE)
    print(time.perf_counter() - started)


def ours(path: str, batches: int) -> None:
    """Prints the seconds that clplat takes for batches in an order drawn."""
    import torch

    from clplat.streams.images import Images

    data = Images(path=path, experiences=1, in_memory=False, workers=WORKERS, normalize="none")[0].train
    assert data is not None
    parts = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[: batches * BATCH].split(BATCH)
    coming = data.ahead(parts)
    _timed(coming.batch(part)[0] for part in parts)


def theirs(path: str, batches: int) -> None:
    """Prints the seconds that a DataLoader takes for batches in an order drawn."""
    import torch
    from torch.utils.data import DataLoader, Dataset

    from clplat.data.pictures import read_picture

    files = sorted(Path(path).glob("train/*/*.jpg"))

    class Pictures(Dataset):
        def __len__(self) -> int:
            return batches * BATCH

        def __getitem__(self, row: int) -> torch.Tensor:
            return torch.from_numpy(read_picture(files[row]).transpose(2, 0, 1).copy())

    order = torch.randperm(batches * BATCH, generator=torch.Generator().manual_seed(0)).tolist()
    _timed(iter(DataLoader(Pictures(), BATCH, sampler=order, num_workers=WORKERS)))


def throughput(quick: bool) -> list[Row]:
    """Time of batches of decoded pictures, in turn."""
    batches, sides = (4, 1) if quick else (40, 7)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLPLAT_CACHE"] = f"{folder}/cache"
        path = write_folder(Path(folder) / "pictures", 2 * batches * BATCH)
        pairs = [(seconds("ours", path, batches), seconds("theirs", path, batches)) for _ in range(sides)]
    name = f"{BATCH} pictures of {SIDE} pixels decoded, {WORKERS} workers, next to torch's DataLoader"
    each = [[1000 * side / (batches - 1) for side in both] for both in zip(*pairs, strict=True)]
    return [paired(name, "ms", *each, "ratio", LIMIT_RATIO)]


def rows(quick: bool = False) -> list[Row]:
    """Memory, then throughput."""
    return memory(quick) + throughput(quick)
