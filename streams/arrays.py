"""Arrays: your own data, from an archive of plain arrays or handed over in Python."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.datasets import find_root, read_npz
from clplat.data.scenarios import ScenarioStream, Source
from clplat.errors import MissingError, UserError

PARTS = ("train_inputs", "train_labels", "test_inputs", "test_labels")
DOMAINS = ("train_domains", "test_domains")


class Arrays(ScenarioStream):
    """Your own arrays: an .npz or .safetensors file, or `Arrays(train=(x, y), test=(x, y))` in Python.

    Inputs are (N, D) features, (N, C, H, W) images, or any (N, ...): bytes stay bytes and are scaled to [0, 1] a batch
    at a time, any other numbers become 32-bit floats and are taken as they are. Labels (N,) are integers ≥ 0.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: a relative path that is not in the working directory is looked for here; null is $CLPLAT_DATA.
        path: file with train_inputs, train_labels, test_inputs and test_labels; train_domains and test_domains (N,)
            where there are domains.
        train: (inputs, labels), or (inputs, labels, domains), as NumPy arrays or tensors; from Python only.
        test: the same, held out.

    Raises:
        UserError: neither a path nor arrays, or both; shapes that do not match.
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
        **scenario: Any,
    ) -> None:
        given = [v is not None for v in (path, train, test)]
        if given not in ([True, False, False], [False, True, True]):
            raise UserError(f"stream.path: {path!r} (valid: a file, or in Python both train and test in its place)")
        pairs = {**_pair("train", train), **_pair("test", test)} if path is None else {}
        arrays = pairs if path is None else _read(_find(path, data_root))
        inputs = {part: _inputs(f"{part}_inputs", arrays) for part in ("train", "test")}
        ids = {key: _tensor(key, arrays[key]) for key in arrays if key in (*PARTS[1::2], *DOMAINS)}
        if inputs["train"].shape[1:] != inputs["test"].shape[1:] or inputs["train"].dtype != inputs["test"].dtype:
            shapes = " and ".join(f"{p} {tuple(x.shape[1:])} {x.dtype}" for p, x in inputs.items())
            raise UserError(f"stream: inputs differ: {shapes} (valid: one shape and type)")
        source = Source(
            (inputs["train"], ids["train_labels"]),
            (inputs["test"], ids["test_labels"]),
            train_domains=ids.get("train_domains"),
            test_domains=ids.get("test_domains"),
        )
        super().__init__(source, seed=seed, **scenario)


def _find(path: str, data_root: str | None) -> Path:
    file, root = Path(path).expanduser(), find_root(data_root)
    if file.suffix not in (".npz", ".safetensors"):
        raise UserError(
            f"stream.path: {path!r} is of an unknown type (valid: .npz, .safetensors; nothing is unpickled)"
        )
    return root / file if root is not None and not file.is_file() else file


def _read(file: Path) -> dict[str, Any]:
    if file.suffix == ".npz":
        return dict(read_npz(file, PARTS))
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        arrays = load_file(file)
    except FileNotFoundError:
        raise MissingError(f"stream.path: {file} is missing: put it there, or name another path") from None
    except (OSError, SafetensorError) as error:
        raise MissingError(f"stream.path: {file} can't be read ({error}): replace it by a whole file") from error
    absent = [key for key in PARTS if key not in arrays]
    if absent:
        raise MissingError(f"stream.path: {file} lacks {', '.join(absent)} (it has: {', '.join(sorted(arrays))})")
    return arrays


def _pair(part: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, tuple | list) or len(value) not in (2, 3):
        raise UserError(f"stream.{part}: {type(value).__name__} (valid in Python: (inputs, labels); else give path)")
    return dict(zip((f"{part}_inputs", f"{part}_labels", f"{part}_domains"), value, strict=False))


def _tensor(key: str, value: Any) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    array = np.asarray(value)
    if array.dtype.kind not in "biuf":
        raise UserError(f"stream: {key} holds {array.dtype} (valid: numbers)")
    return torch.from_numpy(np.ascontiguousarray(array))


def _inputs(key: str, arrays: dict[str, Any]) -> Tensor:
    values = _tensor(key, arrays[key])
    return values if values.dtype == torch.uint8 else values.to(torch.float32)
