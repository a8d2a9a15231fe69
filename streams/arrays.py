"""Arrays: your own data, from an archive of plain arrays or handed over in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clplat.data.arrays import as_inputs, numbers
from clplat.data.datasets import find_path, read_npz
from clplat.data.on_disk import npy_file, safetensors_files, stays
from clplat.data.scenarios import ScenarioStream, Source
from clplat.errors import MissingError, UserError

PARTS = ("train_inputs", "train_labels", "test_inputs", "test_labels")
DOMAINS = ("train_domains", "test_domains")


class Arrays(ScenarioStream):
    """Your own arrays: an .npz or .safetensors file, a folder of .npy files, or `Arrays(train=(x, y), test=(x, y))` in
    Python.

    Inputs are (N, D) features, images (N, H, W), (N, C, H, W) or (N, H, W, C), or any (N, ...). Bytes are held as such
    and scaled to [0, 1] a batch at a time, 16-bit images are scaled to [0, 1]; features and floats are taken as they
    are, as 32-bit floats. Labels (N,) are integers ≥ 0, of any size.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: a relative path that is not in the working directory is looked for here; null is $CLPLAT_DATA.
        path: file with train_inputs, train_labels, test_inputs and test_labels; train_domains and test_domains (N,)
            where there are domains; or a folder of train_inputs.npy and so on.
        train: (inputs, labels), or (inputs, labels, domains), as NumPy arrays or tensors; from Python only.
        test: the same, held out.
        layout: of images in four axes: channels_first or channels_last; null tells them apart by their sides.
        scale: number that inputs are divided by, > 0: the one that is white. null: 255 for bytes, 65535 for 16-bit
            images, 1 for features and floats; images of other integers, or with unused bits, need it.
        in_memory: false leaves the inputs of a .safetensors file or a folder where they are, and reads them as they are
            needed, which changes no result; null does so if they would take more than a quarter of the free memory.
        workers: threads that read what is not in memory, ≥ 1; null: as many as processor cores, at most 8.

    Raises:
        UserError: neither a path nor arrays, or both; shapes that do not match; inputs that can be read in two ways.
        MissingError: no such file, or one that can't be read.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        path: str | None = None,
        train: Any = None,
        test: Any = None,
        layout: Literal["channels_first", "channels_last"] | None = None,
        scale: float | None = None,
        in_memory: bool | None = None,
        workers: int | None = None,
        **scenario: Any,
    ) -> None:
        if workers is not None and workers < 1:
            raise UserError(f"stream.workers: {workers} is out of range (valid: ≥ 1, or null)")
        given = [v is not None for v in (path, train, test)]
        if given not in ([True, False, False], [False, True, True]):
            raise UserError(f"stream.path: {path!r} (valid: a file, or in Python both train and test in its place)")
        pairs = {**_pair("train", train), **_pair("test", test)} if path is None else {}
        _same_columns(pairs)
        held = list[str]()
        arrays = pairs if path is None else _read(_find(path, data_root), in_memory, held)
        if in_memory is False and not held:
            what = f"{path} can't be read in parts" if path else "arrays given in Python are in memory"
            raise UserError(f"stream.in_memory: false, but {what} (valid: null, or .safetensors, or a folder of .npy)")
        inputs, notes, white = as_inputs({key: arrays[key] for key in PARTS[::2]}, layout, scale, workers)
        notes += held
        ids = {
            key: torch.from_numpy(np.require(numbers(key, arrays[key]), requirements=["C", "W"]))
            for key in arrays
            if key in (*PARTS[1::2], *DOMAINS)
        }
        if idle := sorted(set(arrays) - set(PARTS) - set(DOMAINS)):
            notes.append(f"stream.path: {', '.join(idle)} in {path} are not used (known: {', '.join(PARTS + DOMAINS)})")
        source = Source(
            (inputs["train_inputs"], ids["train_labels"]),
            (inputs["test_inputs"], ids["test_labels"]),
            train_domains=ids.get("train_domains"),
            test_domains=ids.get("test_domains"),
        )
        super().__init__(source, seed=seed, **scenario)
        self.notes = (*self.notes, *notes)
        self.origin = {"white": white, "layout": layout} if white is not None else {"layout": layout}


def _find(path: str, data_root: str | None) -> Path:
    file = find_path(path, data_root)
    if file.suffix not in (".npz", ".safetensors") and not file.is_dir():
        what = f"stream.path: {path!r} is of an unknown type"
        raise UserError(f"{what} (valid: .npz, .safetensors, a folder of .npy; nothing is unpickled)")
    return file


def _read(file: Path, in_memory: bool | None, notes: list[str]) -> dict[str, Any]:
    """All arrays of a file or folder; inputs that stay there as `ArrayFile`, of which `notes` gets a line."""
    if file.suffix == ".npz" and not file.is_dir():
        return dict(read_npz(file, PARTS))
    files = sorted(file.glob("*.npy")) if file.is_dir() else [file]
    left = stays(in_memory, sum(f.stat().st_size for f in files if f.is_file()), f"the arrays of {file}", notes)
    if file.is_dir():
        arrays = {f.stem: npy_file(f.stem, f, whole=not left or f.stem not in PARTS[::2]) for f in files}
    elif left:
        found = safetensors_files(file)
        arrays = {key: f if key in PARTS[::2] else f.rows(range(f.shape[0])) for key, f in found.items()}
    else:
        arrays = _load(file)
    absent = [key for key in PARTS if key not in arrays]
    if absent:
        has = ", ".join(sorted(arrays)) or "nothing"
        raise MissingError(f"stream.path: {file} lacks {', '.join(absent)} (it has: {has})")
    return arrays


def _load(file: Path) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except FileNotFoundError:
        raise MissingError(f"stream.path: {file} is missing: put it there, or name another path") from None
    except (OSError, SafetensorError) as error:
        raise MissingError(f"stream.path: {file} can't be read ({error}): replace it by a whole file") from error


def _same_columns(pairs: dict[str, Any]) -> None:
    """Refuse frames whose columns are not the same ones in the same order: they are read by place."""
    first, second = ([*map(str, getattr(pairs.get(key), "columns", ()))] for key in PARTS[::2])
    if first and second and first != second:
        raise UserError(f"stream.test: columns differ from those of train: {second[:8]}, not {first[:8]}")


def _pair(part: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, tuple | list) or len(value) not in (2, 3):
        raise UserError(f"stream.{part}: {type(value).__name__} (valid in Python: (inputs, labels); else give path)")
    return dict(zip((f"{part}_inputs", f"{part}_labels", f"{part}_domains"), value, strict=False))
