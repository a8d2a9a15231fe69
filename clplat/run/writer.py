"""A thread that writes while the run goes on: one job at a time, and what goes wrong in it is raised in the run."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable

THREAD = "clplat-checkpoint"


class Writer:
    """Does jobs one after the other, each in a thread of its own."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self.seconds, self.processor = 0.0, 0.0  # that the last job took: on the clock, and of a processor

    @property
    def busy(self) -> bool:
        """Whether a job is under way."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, job: Callable[[], object]) -> None:
        """Begin a job once the one before is done. Raises what went wrong in that one."""
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(job,), name=THREAD)
        self._thread.start()

    def check(self) -> None:
        """Raise what went wrong, if the job is over."""
        if self._error is not None and not self.busy:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when nothing is under way. Raises what went wrong."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def finish(self) -> None:
        """As `wait`, beside another error: what went wrong here too is told on stderr."""
        try:
            self.wait()
        except Exception as error:  # noqa: BLE001 - the other error is the one to raise
            print(f"clplat: {error}", file=sys.stderr, flush=True)

    def _do(self, job: Callable[[], object]) -> None:
        started, processor = time.perf_counter(), time.thread_time()
        try:
            job()
        except BaseException as error:  # noqa: BLE001 - raised in the run
            self._error = error
        finally:
            self.seconds, self.processor = time.perf_counter() - started, time.thread_time() - processor
