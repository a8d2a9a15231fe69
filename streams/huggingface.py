"""HuggingFace: any labelled image or feature set that the `datasets` package reads: its cache, a folder or the hub.

Lhoest et al., Datasets: A Community Library for Natural Language Processing, EMNLP 2021 (demonstrations).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.arrays import as_inputs
from clplat.data.datasets import stratified_split
from clplat.data.pictures import WHITE, pixels, squeezed, stacked
from clplat.data.scenarios import ScenarioStream, Source
from clplat.errors import MissingError, UserError


class HuggingFace(ScenarioStream):
    """Any image or feature set of Hugging Face `datasets` (extra `huggingface`; 4 or later runs no code of a data set).

    It is read once into tensors, pictures as `clplat.data.pictures` says. Without a network (HF_HUB_OFFLINE=1) it must
    be in the package's cache.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: not used: the package has a cache of its own (HF_HOME).
        dataset: name on the hub, or a local folder.
        config: configuration of the data set; null takes its default.
        inputs: column of images, or of numbers or lists of numbers of one length; null takes image, img, else inputs.
        label: column of integer labels.
        train_split: split to learn from.
        test_split: split held out; null takes test, else validation, valid, val or dev, else a share of a set of one
            split only.
        test_share: in (0, 1), of each class's samples, always the same ones, held out of a set of one split only.
        size: images are resized to so many pixels in height and width, ≥ 1; null leaves them, all of one size.
        grey: images become one channel; otherwise three.
        scale: number that arrays of numbers, and pictures of 16 bits, are divided by, > 0: for pictures the one that is
            white. null: 1, and images of integers are refused; for pictures 65535.

    Raises:
        UserError: the package is not installed or too old, a column or split is missing, or samples do not match.
        MissingError: the data set is neither in the cache nor on the hub.
    """

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        dataset: str = "ylecun/mnist",
        config: str | None = None,
        inputs: str | None = None,
        label: str = "label",
        train_split: str = "train",
        test_split: str | None = None,
        size: int | None = None,
        grey: bool = False,
        test_share: float = 0.2,
        scale: float | None = None,
        **scenario: Any,
    ) -> None:
        if size is not None and size < 1:
            raise UserError(f"stream.size: {size} is out of range (valid: ≥ 1, or null)")
        if not 0 < test_share < 1:
            raise UserError(f"stream.test_share: {test_share} is out of range (valid: in (0, 1))")
        splits = _load(dataset, config)
        test_split, notes = _test_split(splits, test_split, train_split, dataset)
        alone = test_split is None
        for key, split in (("train_split", train_split), ("test_split", test_split)):
            if split is not None and split not in splits:
                raise UserError(f"stream.{key}: {split!r} is not in {dataset} (valid: {', '.join(splits)})")
        parts = [splits[split] for split in (train_split, test_split) if split is not None]
        columns = list(parts[0].column_names)
        column = inputs or next((c for c in ("image", "img", "inputs") if c in columns), "inputs")
        for key, name in (("inputs", column), ("label", label)):
            if any(name not in part.column_names for part in parts):
                raise UserError(f"stream.{key}: no column {name!r} in {dataset} (valid: {', '.join(columns)})")
        names = [tuple(getattr(part.features[label], "names", None) or ()) for part in parts]
        if len(set(names)) > 1:
            raise UserError(f"stream.label: the classes of {train_split} and {test_split} are named differently")
        samples, found, self.origin = _inputs([_column(part, column) for part in parts], size, grey, scale)
        notes += found
        labels = [_labels(part[label], label) for part in parts]
        if alone:
            rows = [torch.from_numpy(r) for r in _held_out(labels[0].numpy(), test_share)]
            samples, labels = [samples[0][r] for r in rows], [labels[0][r] for r in rows]
            what = f"{dataset} has one split only, of which {len(rows[1])} of {len(rows[0]) + len(rows[1])} samples"
            notes.append(f"stream.test_share: {test_share:g}: {what} are held out, always the same ones")
        source = Source((samples[0], labels[0]), (samples[1], labels[1]), class_names=names[0])
        super().__init__(source, seed=seed, **scenario)
        self.notes = (*self.notes, *notes)


def _load(dataset: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            "stream: 'huggingface' needs the package datasets: pip install 'clplat[huggingface]'"
        ) from error
    if int(datasets.__version__.split(".")[0]) < 4:
        raise UserError(
            f"stream: 'huggingface' needs datasets 4 or later, not {datasets.__version__} (older ones run code that a "
            "data set brings): pip install 'clplat[huggingface]'"
        )
    try:
        return datasets.load_dataset(dataset, config)
    except ValueError as error:
        raise UserError(f"stream.config: {config!r} of {dataset}: {error}") from error
    except (OSError, RuntimeError) as error:
        raise MissingError(
            f"stream.dataset: {dataset} is not a folder, not in the cache of datasets (HF_HOME), and could not be had "
            f"from the hub ({error})"
        ) from error


def _test_split(splits: Any, asked: str | None, train: str, dataset: str) -> tuple[str | None, list[str]]:
    """The split held out, None where a share of the only one is; and lines that say what was taken for one."""
    if asked is not None or "test" in splits:
        return asked or "test", []
    if len(splits) == 1:
        return None, []
    held = next((name for name in ("validation", "valid", "val", "dev") if name in splits and name != train), "test")
    return held, [f"stream.test_split: {dataset} has no split test: its split {held} is the test set"]


def _column(part: Any, name: str) -> list[Any]:
    """All values of a column; pictures are decoded here."""
    try:
        return list(part[name])
    except (OSError, SyntaxError) as error:
        raise MissingError(f"stream.inputs: a picture of column {name!r} can't be read ({error})") from error


def _inputs(
    parts: list[list[Any]], size: int | None, grey: bool, scale: float | None
) -> tuple[list[Any], list[str], dict[str, Any]]:
    """Each part's pictures as (N, C, H, W), or numbers as (N, ...) floats; lines that say what was not sure; and
    `Stream.origin`."""
    if any(hasattr(value, "convert") for part in parts for value in part):
        fit = None if size is None else squeezed(size)
        for part in parts:
            empty = next((row for row, value in enumerate(part) if not hasattr(value, "convert")), None)
            if empty is not None:
                raise UserError(f"stream.inputs: row {empty} holds {type(part[empty]).__name__} (valid: pictures)")
        rows = [[pixels(v, f"the picture in row {i}", grey=grey, fit=fit) for i, v in enumerate(p)] for p in parts]
        found = stacked(*rows, scale=scale)
        deep = found[0].dtype != torch.uint8
        return found, [], {"fit": "none" if size is None else "squeezed"} | ({"white": scale or WHITE} if deep else {})
    if size is not None or grey:
        raise UserError("stream.size, stream.grey: have no meaning for numbers (valid: null, false)")
    try:
        arrays = [np.array(part) for part in parts]
        arrays = [a[:, None] if a.ndim == 1 else a for a in arrays]
    except (ValueError, TypeError) as error:
        raise UserError(f"stream.inputs: neither images nor numbers of one length ({error})") from error
    if any(a.dtype.kind not in "biuf" for a in arrays):
        raise UserError(f"stream.inputs: neither images nor numbers of one length, but {arrays[0].dtype}")
    made, notes, white = as_inputs({f"split {i}": a for i, a in enumerate(arrays)}, scale=scale)
    return list(made.values()), notes, {} if white is None else {"white": white}


def _labels(values: Any, column: str) -> Tensor:
    labels = np.array(list(values))
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"stream.label: column {column!r} holds {labels.dtype} (valid: integers)")
    return torch.from_numpy(labels.astype(np.int64))


def _held_out(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows held out."""
    rare = np.unique(labels)[np.unique(labels, return_counts=True)[1] < 2].tolist()
    if rare:
        raise UserError(f"stream.test_share: labels {rare[:5]} have one sample only (valid: a set with a test split)")
    return stratified_split(labels, test_share=share, random_state=0)
