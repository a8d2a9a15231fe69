"""Avalanche: any benchmark of avalanche-lib (Lomonaco et al., CVPR Workshops 2021; Carta et al., JMLR 2023).

A benchmark is read once, sample by sample, into tensors, and from then on a batch is one indexing call. Its evaluation
transformations are part of what is read, for training samples too; its random training augmentations are not.
"""

from __future__ import annotations

import difflib
import inspect
import operator
import warnings
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from clplat.data.arrays import as_inputs, channel_axis, numbers
from clplat.data.datasets import find_root
from clplat.data.pictures import pixels
from clplat.data.splits import hold_out, places
from clplat.data.worlds import generator
from clplat.errors import MissingError, UserError
from clplat.stream import Data, Experience, Kind, Stream


class Avalanche(Stream):
    """Any benchmark of Avalanche, such as SplitMNIST or PermutedMNIST. Needs `pip install clplat[avalanche]`.

    Class ids are renumbered in the order met; `class_names` keeps the benchmark's own. The task is known at test time
    where the benchmark gives its experiences different task labels (`return_task_id: true`).

    Args:
        seed: of the benchmark, where it takes one, and of the validation split; null takes the run's seed.
        data_root: where the benchmark keeps its data set; null is $CLPLAT_DATA, or else Avalanche's own folder.
        benchmark: name of a function in avalanche.benchmarks; or, from Python, a benchmark.
        options: arguments of that function, such as n_experiences.
        validation: share, in [0, 1), of each class's training samples held out in each experience.
        scale: number that samples are divided by, > 0: the one that is white. null: 255 for bytes, 65535 for 16 bits,
            refused where the upper ones are unused in all of them; floats are taken as they are.

    Raises:
        UserError: avalanche-lib is not installed, the benchmark is unknown, or its arguments are wrong.
        MissingError: the benchmark's data are not there and could not be fetched.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARN})
    paper: ClassVar[str] = "arXiv:2104.00405"

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        benchmark: Any = "SplitMNIST",
        options: dict[str, Any] | None = None,
        validation: float = 0.0,
        scale: float | None = None,
    ) -> None:
        seed = 0 if seed is None else seed
        if not 0 <= validation < 1:
            raise UserError(f"stream.validation: {validation!r} is out of range (valid: in [0, 1))")
        if isinstance(benchmark, str):
            benchmark = _make(benchmark, options or {}, seed, data_root)
        elif options:
            raise UserError("stream.options: has no meaning with a finished benchmark (valid: null)")
        train, tests = list(benchmark.train_stream), list(benchmark.test_stream)
        if not train or len(tests) not in (1, len(train)):
            counts = f"{len(train)} training and {len(tests)} test experiences"
            raise UserError(f"stream.benchmark: {counts} (valid: as many of each, or one test experience)")
        (inputs, labels, rows), (test_inputs, test_labels, test_rows), notes, white = _read_both(train, tests, scale)
        met = list(dict.fromkeys(c for r in rows for c in np.unique(labels[r]).tolist()))
        unknown = np.setdiff1d(test_labels, met).tolist()
        if unknown:
            raise UserError(f"stream.benchmark: test labels {unknown[:5]} are not trained on (valid: the same)")
        if len(tests) == 1:
            # One test set for all experiences: each is scored on the classes it teaches.
            test_rows = [test_rows[0][np.isin(test_labels, labels[r])] for r in rows]
        numbers = places(labels, np.array(met))
        tasks = _tasks(train)
        train_data = inputs, torch.from_numpy(numbers)
        test_data = test_inputs, torch.from_numpy(places(test_labels, np.array(met)))
        experiences = []
        for i, kept in enumerate(rows):
            held = np.empty(0, dtype=np.int64)
            if validation > 0:
                kept, held = hold_out(kept, labels, validation, generator(seed, "validation", i))
            experiences.append(
                Experience(
                    index=i,
                    name=f"experience_{i}",
                    kind=Kind.LEARN,
                    train=Data(*train_data, torch.from_numpy(kept)),
                    test=Data(*test_data, torch.from_numpy(test_rows[i])) if len(test_rows[i]) else None,
                    valid=Data(*train_data, torch.from_numpy(held)) if len(held) else None,
                    classes=tuple(np.unique(numbers[rows[i]]).tolist()),
                    task=tasks[i] if len(set(tasks)) > 1 else i,
                )
            )
        super().__init__(
            experiences,
            num_classes=len(met),
            input_shape=tuple(inputs.shape[1:]),
            task_known=len(set(tasks)) > 1,
            class_names=[str(c) for c in met],
        )
        self.notes = tuple(notes)
        self.origin = {"refused": {"pictures": "Avalanche's transformations are code, which no checkpoint holds"}}
        self.origin |= {"white": white} if white is not None else {}


def _make(name: str, options: dict[str, Any], seed: int, data_root: str | None) -> Any:
    """Call the benchmark's function, without touching torch's global generator, which some of them seed."""
    try:
        with warnings.catch_warnings():
            # Deprecations inside avalanche-lib, which the user can't act on.
            warnings.simplefilter("ignore")
            import avalanche.benchmarks as library
    except ImportError as error:
        raise UserError(
            f"stream: 'avalanche' needs avalanche-lib ({error}): pip install 'clplat[avalanche]'"
        ) from error
    known = {k: v for k, v in vars(library).items() if inspect.isfunction(v) and not k.startswith("_")}
    if name not in known:
        near = difflib.get_close_matches(name, known) or sorted(k for k in known if k.startswith("Split"))
        raise UserError(f"stream.benchmark: {name!r} is not in avalanche.benchmarks (nearest: {', '.join(near)})")
    signature = inspect.signature(known[name])
    root = find_root(data_root)
    given = {"seed": seed, **({"dataset_root": str(root)} if root else {})}
    arguments = {**{k: v for k, v in given.items() if k in signature.parameters}, **options}
    try:
        signature.bind(**arguments)
    except TypeError as error:
        raise UserError(f"stream.options: {error} (valid for {name}: {', '.join(signature.parameters)})") from error
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return known[name](**arguments)
    except (OSError, RuntimeError) as error:
        where = arguments.get("dataset_root", "Avalanche's own data folder")
        raise MissingError(
            f"stream.benchmark: the data of {name} could not be had ({error}): put them in {where}"
        ) from error
    except (ValueError, TypeError, AssertionError) as error:
        raise UserError(f"stream.options: {name} refuses {options!r} ({error})") from error


def _read_both(train: list[Any], tests: list[Any], scale: float | None) -> Any:
    """Inputs (N, ...), labels (N,) and each experience's rows, of training and test; notes, and what is white."""
    (raw, *known, pictures), (raw_test, *known_test, _) = (_read([e.dataset for e in part]) for part in (train, tests))
    if scale is None and pictures and raw.dtype == np.uint8:
        scale = 255  # however dark they are
    layout: Any = "channels_first" if raw.ndim == 4 else None
    found, notes, white = as_inputs({"training samples": raw, "test samples": raw_test}, layout, scale)
    return (found["training samples"], *known), (found["test samples"], *known_test), notes, white


def _read(parts: list[Any]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray], bool]:
    """All samples of several data sets as they come (N, ...), labels (N,), each part's rows; are they pictures?"""
    total = sum(len(p) for p in parts)
    inputs, labels, rows, at = np.empty(0), np.empty(total, dtype=np.int64), [], 0
    pictures = False
    for part in parts:
        dataset = part.eval() if hasattr(part, "eval") else part
        rows.append(np.arange(at, at + len(dataset)))
        for i in range(len(dataset)):
            sample, label = dataset[i][:2]
            pictures = hasattr(sample, "convert")
            sample = _sample(sample, f"sample {i} of an experience")
            if at == 0:
                inputs = np.empty((total, *sample.shape), sample.dtype)
            if (sample.shape, sample.dtype) != (inputs.shape[1:], inputs.dtype):
                shapes = " and ".join(f"{x.shape} {x.dtype}" for x in (inputs[0], sample))
                raise UserError(f"stream.benchmark: samples of {shapes} (valid: one shape; resize in eval_transform)")
            try:
                inputs[at], labels[at], at = sample, operator.index(label), at + 1
            except TypeError:
                raise UserError(f"stream.benchmark: label {label!r} is no integer (valid: one a sample)") from None
    return inputs, labels, rows, pictures


def _sample(value: Any, name: str) -> np.ndarray:
    """One sample, images as (C, H, W); of bytes or 16 bits where it is a picture, else as it comes."""
    if hasattr(value, "convert"):
        return pixels(value, name, grey=value.mode in ("1", "L", "I;16")).transpose(2, 0, 1)
    array = numbers(name, value)
    if isinstance(value, Tensor) or array.ndim not in (2, 3):
        return array
    axis = channel_axis((1, *array.shape)) if array.ndim == 3 else 0
    if axis is None:
        what = f"the channels of {array.shape} can't be told from rows and columns"
        raise UserError(f"stream.benchmark: {what} (valid: tensors (C, H, W), as by eval_transform)")
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1) if axis == 3 else array


def _tasks(train: list[Any]) -> list[int]:
    """Task of each experience, numbered as met.

    Raises:
        UserError: an experience holds samples of several.
    """
    given = [sorted(getattr(e, "task_labels", None) or [0]) for e in train]
    several = next((i for i, labels in enumerate(given) if len(labels) > 1), None)
    if several is not None:
        raise UserError(
            f"stream.benchmark: experience {several} holds tasks {given[several][:5]} (valid: one task an experience)"
        )
    number = {label: i for i, label in enumerate(dict.fromkeys(labels[0] for labels in given))}
    return [number[labels[0]] for labels in given]
