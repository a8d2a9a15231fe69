"""Inputs that are not in memory: batches of them are read when they are asked for, by threads, and read ahead.

Shapes: N samples of a data set, B of a batch.
"""

from __future__ import annotations

import atexit
import copy
import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from threading import Thread
from threading import enumerate as enumerate_threads
from typing import Any, Self
from weakref import WeakSet

import torch
from torch import Tensor

AHEAD = 2  # batches that are read before they are asked for
MOST_WORKERS = 8  # threads, unless more are asked for
_NAME = "clplat-read"  # of each thread
_PATIENCE = 10.0  # seconds that the end of the process waits for a thread


def default_workers() -> int:
    """Processor cores that this process may use, at most 8."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, MOST_WORKERS)


class Inputs:
    """What stands in the place of a tensor (N, ...) in `Data.inputs`, and is indexed as one by rows (B,) int64.

    A subclass writes `read`. What a row holds depends on the row alone, however it is read.

    Args:
        shape: (N, ...).
        dtype: of what `read` gives.
        span: smallest and largest number that any row holds; None of bytes and of whole numbers.
        workers: threads that read, ≥ 1; None: `default_workers`.
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, span: tuple[float, float] | None = None,
        workers: int | None = None,
    ) -> None:  # fmt: skip
        self.shape, self.dtype, self.span = torch.Size(shape), dtype, span
        self.workers = workers or default_workers()
        self.device = torch.device("cpu")
        self._readers: _Readers | None = None

    def read(self, rows: list[int], out: Tensor) -> None:
        """Put what `rows` hold into `out` (len(rows), ...); called by several threads at once.

        Raises:
            MissingError: a row can't be read.
        """
        raise NotImplementedError

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def numel(self) -> int:
        """Numbers in all rows."""
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        """Whether they are floats."""
        return self.dtype.is_floating_point

    def to(self, device: torch.device) -> Self:
        """The same, whose batches come on `device`."""
        moved = copy.copy(self)
        moved.device = device
        return moved

    def __getitem__(self, rows: Tensor) -> Tensor:
        return self.start(rows).result()

    def start(self, rows: Tensor) -> Reading:
        """Begin to read `rows` (B,)."""
        wanted = rows.tolist()
        made = torch.empty((len(wanted), *self.shape[1:]), dtype=self.dtype)
        if self._readers is None:
            self._readers = _Readers(self.workers)
        share = -(-len(wanted) // self.workers) or 1
        pieces = [
            self._readers.submit(self.read, wanted[at : at + share], made[at : at + share])
            for at in range(0, len(wanted), share)
        ]
        return Reading(made, pieces, self.device)

    def split(self, size: int) -> Iterator[Tensor]:
        """All, `size` at a time, read ahead."""
        parts = torch.arange(len(self)).split(size)
        ahead = Ahead(self, parts)
        return (ahead[part] for part in parts)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": None}


class Reading:
    """A batch under way.

    Args:
        made: (B, ...), filled by `pieces`.
        device: where it is to be.
    """

    def __init__(self, made: Tensor, pieces: list[Future[None]], device: torch.device) -> None:
        self.made, self.pieces, self.device = made, pieces, device

    def result(self) -> Tensor:
        """The batch; waits for it, and raises what reading it raised."""
        for piece in self.pieces:
            piece.result()
        return self.made.to(self.device)

    def cancel(self) -> None:
        """Read no more of it than has been begun."""
        for piece in self.pieces:
            piece.cancel()


class Ahead(Inputs):
    """The same inputs, of which batches are read before they are asked for.

    That is a hint: rows that were not announced, or in another order, are read when they are asked for.

    Args:
        inputs: what is read.
        coming: rows (B,) of each batch, in the order in which they will be asked for.
    """

    def __init__(self, inputs: Inputs, coming: Iterable[Tensor]) -> None:
        self.__dict__.update(inputs.__dict__)
        self._inputs, self._coming = inputs, iter(coming)
        self._begun: deque[tuple[Tensor, Reading]] = deque()

    def start(self, rows: Tensor) -> Reading:
        self._begin(1)
        if self._begun and torch.equal(self._begun[0][0], rows):
            reading = self._begun.popleft()[1]
        else:
            reading = self._inputs.start(rows)
        self._begin(AHEAD)
        return reading

    def _begin(self, count: int) -> None:
        """Have `count` batches under way, if so many are to come."""
        while len(self._begun) < count and (rows := next(self._coming, None)) is not None:
            self._begun.append((rows, self._inputs.start(rows)))

    def __del__(self) -> None:
        for _, reading in self._begun:
            reading.cancel()


class _Readers:
    """Threads that do jobs in order, and end when nobody needs them; at the end of the process what is begun is ended.

    Args:
        count: of threads, ≥ 1.
    """

    def __init__(self, count: int) -> None:
        self._count, self._jobs = count, SimpleQueue[Any]()
        _READERS.add(self)
        for _ in range(count):
            Thread(target=_work, args=(self._jobs,), name=_NAME, daemon=True).start()

    def submit(self, function: Any, *args: Any) -> Future[None]:
        """Have `function(*args)` called."""
        future: Future[None] = Future()
        self._jobs.put((future, function, args))
        return future

    def stop(self) -> None:
        """Begin no job any more."""
        with suppress(Empty):
            while True:
                self._jobs.get_nowait()
        self.__del__()

    def __del__(self) -> None:
        for _ in range(self._count):
            self._jobs.put(None)


_READERS: WeakSet[_Readers] = WeakSet()


@atexit.register
def _end() -> None:
    """Wait for jobs under way: a thread that is in code of torch while Python is taken down aborts the process."""
    for readers in list(_READERS):
        readers.stop()
    for thread in enumerate_threads():
        if thread.name == _NAME:
            thread.join(_PATIENCE)


def _work(jobs: SimpleQueue[Any]) -> None:
    while (job := jobs.get()) is not None:
        future, function, args = job
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(function(*args))
            except BaseException as error:  # noqa: BLE001 - raised where the batch is asked for
                future.set_exception(error)
        del job, future, function, args  # or the last batch would live on
