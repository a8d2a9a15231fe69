"""HuggingFace: any labelled image or feature set that the `datasets` package reads: its cache, a folder or the hub.

Lhoest et al., Datasets: A Community Library for Natural Language Processing, EMNLP 2021 (demonstrations).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.datasets import channels_first
from clplat.data.scenarios import ScenarioStream, Source
from clplat.errors import MissingError, UserError


class HuggingFace(ScenarioStream):
    """Any image or feature set of Hugging Face `datasets` (version 4 or later, which runs no code of a data set).

    It is read once into tensors. Without a network (HF_HUB_OFFLINE=1) it must be in the package's cache.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: not used: the package has a cache of its own (HF_HOME).
        dataset: name on the hub, or a local folder.
        config: configuration of the data set; null takes its default.
        inputs: column of images, or of numbers or lists of numbers of one length; null takes image, img, else inputs.
        label: column of integer labels.
        train_split: split to learn from.
        test_split: split held out.
        size: images are resized to so many pixels in height and width, ≥ 1; null leaves them, all of one size.
        grey: images become one channel; otherwise three.

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
        test_split: str = "test",
        size: int | None = None,
        grey: bool = False,
        **scenario: Any,
    ) -> None:
        if size is not None and size < 1:
            raise UserError(f"stream.size: {size} is out of range (valid: ≥ 1, or null)")
        splits = _load(dataset, config)
        for key, split in (("train_split", train_split), ("test_split", test_split)):
            if split not in splits:
                raise UserError(f"stream.{key}: {split!r} is not in {dataset} (valid: {', '.join(splits)})")
        train, test = splits[train_split], splits[test_split]
        columns = list(train.column_names)
        column = inputs or next((c for c in ("image", "img", "inputs") if c in columns), "inputs")
        for key, name in (("inputs", column), ("label", label)):
            if name not in columns or name not in test.column_names:
                raise UserError(f"stream.{key}: no column {name!r} in {dataset} (valid: {', '.join(columns)})")
        names = getattr(train.features[label], "names", None)
        source = Source(
            (_inputs(train[column], size, grey), _labels(train[label], label)),
            (_inputs(test[column], size, grey), _labels(test[label], label)),
            class_names=tuple(names or ()),
        )
        super().__init__(source, seed=seed, **scenario)


def _load(dataset: str, config: str | None) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise UserError("stream: 'huggingface' needs the package datasets: pip install 'datasets>=4'") from error
    if int(datasets.__version__.split(".")[0]) < 4:
        raise UserError(
            f"stream: 'huggingface' needs datasets 4 or later, not {datasets.__version__} (older ones run code that a "
            "data set brings): pip install 'datasets>=4'"
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


def _inputs(values: Any, size: int | None, grey: bool) -> Tensor:
    """Images to (N, C, H, W) bytes, numbers to (N, D) floats."""
    values = list(values)
    if values and hasattr(values[0], "convert"):
        images = [image.convert("L" if grey else "RGB") for image in values]
        images = images if size is None else [image.resize((size, size)) for image in images]
        arrays = [np.asarray(image) for image in images]
        shapes = sorted({a.shape for a in arrays})
        if len(shapes) > 1:
            raise UserError(f"stream.size: images of {len(shapes)} shapes, {shapes[0]} to {shapes[-1]} (give a size)")
        return channels_first(np.stack(arrays))
    try:
        numbers = np.array(values, dtype=np.float32)
    except (ValueError, TypeError) as error:
        raise UserError(f"stream.inputs: neither images nor numbers of one length ({error})") from error
    return torch.from_numpy(numbers.reshape(len(numbers), -1) if numbers.ndim == 1 else numbers)


def _labels(values: Any, column: str) -> Tensor:
    labels = np.array(list(values))
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"stream.label: column {column!r} holds {labels.dtype} (valid: integers)")
    return torch.from_numpy(labels.astype(np.int64))
