"""HuggingFace: any labelled image or feature set that the `datasets` package reads: its cache, a folder or the hub.

Lhoest et al., Datasets: A Community Library for Natural Language Processing, EMNLP 2021 (demonstrations).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.arrow import kept
from clplat.data.columns import Options, inputs_of
from clplat.data.datasets import stratified_split
from clplat.data.scenarios import ScenarioStream, Source
from clplat.errors import MissingError, UserError


class HuggingFace(ScenarioStream):
    """Any image or feature set of Hugging Face `datasets` (extra `huggingface`; 4 or later runs no code of a data set).

    Pictures are read as `clplat.data.pictures` says. Without a network (HF_HUB_OFFLINE=1) a set of the hub must be in
    the package's cache.

    Args:
        seed: of everything drawn; null takes the run's seed.
        data_root: not used: the package has a cache of its own (HF_HOME).
        dataset: name on the hub, or a local folder: of data files (.parquet, say), or as `save_to_disk` writes it.
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
        in_memory: false leaves inputs in their Arrow files and reads them as they are needed, which changes no result;
            null does so if they would take more than a quarter of the free memory and can be read so.
        workers: threads that read what is not in memory, ≥ 1; null: as many as processor cores, at most 8.
        streaming: take the set in its streaming form: the two columns are read from first row to last, once, into Arrow
            files in clplat's cache; nothing else of it is kept here.

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
        in_memory: bool | None = None,
        workers: int | None = None,
        streaming: bool = False,
        **scenario: Any,
    ) -> None:
        for key, value in (("size", size), ("workers", workers)):
            if value is not None and value < 1:
                raise UserError(f"stream.{key}: {value} is out of range (valid: ≥ 1, or null)")
        if not 0 < test_share < 1:
            raise UserError(f"stream.test_share: {test_share} is out of range (valid: in (0, 1))")
        splits, told = _load(dataset, config, streaming)
        test_split, notes = _test_split(splits, test_split, train_split, dataset)
        alone = test_split is None
        for key, split in (("train_split", train_split), ("test_split", test_split)):
            if split is not None and split not in splits:
                raise UserError(f"stream.{key}: {split!r} is not in {dataset} (valid: {', '.join(splits)})")
        used = [split for split in (train_split, test_split) if split is not None]
        parts = [splits[split] for split in used]
        columns = list(parts[0].column_names)
        column = inputs or next((c for c in ("image", "img", "inputs") if c in columns), "inputs")
        for key, name in (("inputs", column), ("label", label)):
            if any(name not in part.column_names for part in parts):
                raise UserError(f"stream.{key}: no column {name!r} in {dataset} (valid: {', '.join(columns)})")
        if streaming:
            parts = [kept(part, [column, label], f"{told}/{split}") for part, split in zip(parts, used, strict=True)]
        names = [tuple(getattr(part.features[label], "names", None) or ()) for part in parts]
        if len(set(names)) > 1:
            raise UserError(f"stream.label: the classes of {train_split} and {test_split} are named differently")
        labels, rows = [_labels(part[label], label) for part in parts], None
        if alone:
            rows = _held_out(labels[0].numpy(), test_share)
            labels = [labels[0][torch.from_numpy(r)] for r in rows]
            what = f"{dataset} has one split only, of which {len(rows[1])} of {len(rows[0]) + len(rows[1])} samples"
            notes.append(f"stream.test_share: {test_share:g}: {what} are held out, always the same ones")
        options = Options(size=size, grey=grey, scale=scale, in_memory=in_memory, workers=workers)
        samples, said, self.origin = inputs_of(parts, column, rows, options, f"the inputs of {dataset}")
        notes += said
        source = Source((samples[0], labels[0]), (samples[1], labels[1]), class_names=names[0])
        super().__init__(source, seed=seed, **scenario)
        self.notes = (*self.notes, *notes)


def _load(dataset: str, config: str | None, streaming: bool) -> tuple[Any, str]:
    """The set's splits by name; and, of its streaming form, a name for what it holds."""
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
    folder = Path(dataset).expanduser()
    saved = next((name for name in ("dataset_dict.json", "state.json") if (folder / name).is_file()), None)
    if saved and (streaming or config is not None):
        key, value, valid = ("streaming", "true", "false") if streaming else ("config", repr(config), "null")
        raise UserError(f"stream.{key}: {value} has no meaning for a folder of save_to_disk (valid: {valid})")
    try:
        if saved:
            found = datasets.load_from_disk(str(folder))
            return (found if saved == "dataset_dict.json" else {"train": found}), ""
        if streaming:
            builder = datasets.load_dataset_builder(dataset, config)
            return builder.as_streaming_dataset(), f"{builder.dataset_name}/{builder.config_id}/{builder.hash}"
        return datasets.load_dataset(dataset, config), ""
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


def _labels(values: Any, column: str) -> Tensor:
    labels = np.array(list(values[:]))  # all at once: by rows, the package takes long
    if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"stream.label: column {column!r} holds {labels.dtype} (valid: integers)")
    return torch.from_numpy(labels.astype(np.int64))


def _held_out(labels: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Rows to learn from and rows held out."""
    rare = np.unique(labels)[np.unique(labels, return_counts=True)[1] < 2].tolist()
    if rare:
        raise UserError(f"stream.test_share: labels {rare[:5]} have one sample only (valid: a set with a test split)")
    return stratified_split(labels, test_share=share, random_state=0)
