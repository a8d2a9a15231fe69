"""Which rows each experience of a stream of text gets: those of its task, or shares of several tasks' rows.

What is shared out is a pool: the rows of one class of one task, or of a whole task whose answers are free text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from clplat.data.splits import Rows, blurred, hold_out, repeated
from clplat.data.worlds import generator
from clplat.errors import MissingError, UserError
from clplat.streams._text_tasks import Row, Task


@dataclass(frozen=True)
class Sharing:
    """The options of `Text` that say what of its tasks is met where, which it explains."""

    adapt: list[str] | None
    blurry: float
    disjoint: float
    repetition: float
    experiences: int | None
    train_per_class: int | None
    test_per_class: int | None
    validation: float

    @property
    def unlabelled(self) -> tuple[str, ...]:
        """Names of the tasks that are adapted to."""
        return tuple(self.adapt or ())


@dataclass(frozen=True, eq=False)
class Piece:
    """One experience before it holds tensors: the answers to choose from that it teaches, and rows of the stream's
    tables, to train on, held out and to test on, each (n,) int64, sorted."""

    name: str
    labels: tuple[str, ...]
    kept: torch.Tensor
    held: torch.Tensor
    test: torch.Tensor
    title: str = ""
    adapted: torch.Tensor | None = None  # rows of the test table, in the order in which they are adapted to


def drawn(tasks: Sequence[Task], options: Sharing, seed: int) -> list[dict[str, np.ndarray]]:
    """Of each task, the places in its lists `train` and `test` that the stream takes, sorted.

    Raises:
        MissingError: a task has no training samples.
    """
    found = []
    for i, task in enumerate(tasks):
        train = some(class_ids(task, task.train), options.train_per_class, generator(seed, "train_per_class", i))
        test = some(class_ids(task, task.test), options.test_per_class, generator(0, "test_per_class", i))
        adapted = task.name in options.unlabelled
        train, needed, part = (train[:0], test, "test") if adapted else (train, train, "training")
        if not len(needed):
            raise MissingError(f"stream.tasks: {task.name} has no {part} samples: replace its files by whole ones")
        found.append({"train": train, "test": test})
    return found


def pieces(tasks: Sequence[Task], chosen: Sequence[dict[str, np.ndarray]], options: Sharing, seed: int) -> list[Piece]:
    """The experiences of `tasks`, of whose rows the `chosen` stand in the tables, task after task.

    Raises:
        UserError: an experience gets no training sample.
    """
    starts = np.cumsum([0, *(max(1, len(task.labels)) for task in tasks)])
    train, test = (
        np.concatenate(
            [p + class_ids(t, getattr(t, part))[c[part]] for p, t, c in zip(starts[:-1], tasks, chosen, strict=True)]
        )
        for part in ("train", "test")
    )  # the pool of each row
    shares, taught = _shared(train, starts, options, seed)
    words = [label for task in tasks for label in task.labels or ("",)]
    found = []
    for i, (share, own) in enumerate(zip(shares, taught, strict=True)):
        tested = np.flatnonzero(np.isin(test, own))
        if not options.repetition and tasks[i].name in options.unlabelled:
            order, none = torch.from_numpy(generator(seed, "adapt", i).permutation(tested)), torch.arange(0)
            found.append(Piece(tasks[i].name, tasks[i].labels, none, none, none, adapted=order))
            continue
        if not len(share):
            what = f"is too many for {len(train)} samples"
            raise UserError(f"stream.experiences: {len(shares)} {what}: experience {i} gets none (valid: fewer)")
        kept, held = np.sort(share), share[:0]
        if options.validation:
            kept, held = hold_out(kept, train, options.validation, generator(seed, "validation", i))
        labels = tuple(dict.fromkeys(words[p] for p in np.union1d(own, train[share])))
        rows = torch.from_numpy(kept), torch.from_numpy(held), torch.from_numpy(tested)
        whose = dict.fromkeys(tasks[t].name for t in np.searchsorted(starts, own, side="right") - 1)
        met = (f"repeat_{i}", ", ".join(whose)) if options.repetition else (tasks[i].name, "")
        found.append(Piece(met[0], labels, *rows, title=met[1]))
    return found


def _shared(train: np.ndarray, starts: np.ndarray, options: Sharing, seed: int) -> tuple[list[Rows], list[np.ndarray]]:
    """Of each experience, its training rows and the pools whose test samples it is scored on.

    Args:
        train: (N,) pool of each training row.
        starts: (T + 1,) first pool of each task, and how many there are.
    """
    pools = {p: np.flatnonzero(train == p) for p in range(starts[-1])}
    groups = [np.arange(low, high) for low, high in pairwise(starts)]
    if options.repetition > 0:
        draws = generator(seed, "repetition")
        shares = repeated(pools, groups, options.experiences or len(groups), options.repetition, draws)
        return shares, [np.unique(train[share]) for share in shares]
    if options.blurry > 0:
        return blurred(pools, groups, options.blurry, options.disjoint, generator(seed, "blurry")), groups
    return [np.concatenate([pools[p] for p in group.tolist()]) for group in groups], groups


def class_ids(task: Task, rows: Sequence[Row]) -> np.ndarray:
    """(n,) which of the task's labels each row has; all 0 for free text."""
    place = {label: i for i, label in enumerate(task.labels)}
    return np.array([place.get(row.answers[0], 0) for row in rows], dtype=np.int64)


def some(classes: np.ndarray, count: int | None, rng: np.random.Generator) -> np.ndarray:
    """`count` rows of each class, drawn; sorted."""
    if count is None:
        return np.arange(len(classes))
    drawn = [rng.permutation(np.flatnonzero(classes == c))[:count] for c in np.unique(classes)]
    return np.sort(np.concatenate(drawn)) if drawn else np.arange(0)
