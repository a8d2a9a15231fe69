"""A job, what it ends with, and what all launchers share."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

from clplat.errors import ClplatError, Interrupted, MissingError

Outcome = dict[str, Any]
"""What a job ends with: what it says itself, or `error`, the name of one of ours, with its `faults`; `lost` is true
where its process ended before it did."""

Outcomes = Generator[tuple[int, Outcome], None, None]
"""As jobs end: the place of each, and what it ended with."""

Launcher = Callable[..., Outcomes]
"""(jobs, count, resources, told) → outcomes. `jobs` may be added to whenever one has ended; `told` is called every few
seconds while they are done."""

DEATHS = 2  # of the processes that do a job, after which it is not given out again


class Job(ABC):
    """What a process anywhere does: brings something to its end from wherever it stands, so that it can be given out
    again.

    Args:
        folder: in which relative paths mean something.
        output: folder for what a launcher writes itself.
        devices: that it computes on; 0 where that is not known.
        again: how often it is given out again when its process was lost.
    """

    folder: Path
    output: Path
    devices: int = 1
    again: int = DEATHS

    @abstractmethod
    def do(self) -> Outcome:
        """Do it, in `folder`."""

    def __call__(self) -> Outcome:
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        try:
            return self.do()
        except ClplatError as error:
            return {"error": type(error).__name__, "faults": list(error.faults)}


@contextlib.contextmanager
def stopping(what: str) -> Iterator[None]:
    """SIGTERM stops what was given out too, instead of leaving it without a parent.

    Args:
        what: is said to be stopped.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Interrupted(f"{what}: stopped")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def nothing() -> None:
    """What is told where nobody listens."""


def say(line: str) -> None:
    """A line for the user."""
    print(f"clplat: {line}", file=sys.stderr, flush=True)


def lost(how: str) -> Outcome:
    """What a job ends with whose process ended before it did."""
    return {"error": "ClplatError", "faults": [f"its process {how}"], "lost": True}


def failed(error: BaseException) -> Outcome:
    """The same, as an engine tells it."""
    return lost(f"failed: {' '.join(str(error).split())[-300:]}")


def package(name: str, launcher: str) -> Any:
    """The package that a launcher needs.

    Raises:
        MissingError: it is not installed.
    """
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"launcher: {launcher} needs {name} ({error}): pip install 'clplat[{launcher}]'") from error
