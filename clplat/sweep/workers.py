"""Several processes on one study: started, waited on, and replaced at once where one dies."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

from clplat import errors
from clplat.errors import ClplatError, Interrupted, UserError
from clplat.sweep.early import Run
from clplat.sweep.plan import Plan
from clplat.sweep.store import open_study, storage_faults
from clplat.sweep.trials import POLL, Reaper, is_done, work

MAX_IDLE_DEATHS = 3  # of workers that held no trial, after which none is started again


def employ(study: Any, plan: Plan, count: int, run: Run, told: Callable[[], None]) -> None:
    """Let `count` processes work until the study has all its trials.

    Args:
        told: called twice a second.

    Raises:
        Interrupted: asked to stop by Ctrl-C or SIGTERM; runs under way have checkpoints, their trials were given back.
        ClplatError: what stopped a worker: missing data, say.
    """
    reap, idle_deaths = Reaper(study, plan), 0
    with _team(plan, run) as (start, team), _stop_on_sigterm():
        for _ in range(count):
            start()
        while team:
            ended = wait([w.sentinel for w in team], timeout=POLL)
            told()
            for worker in [w for w in team if w.sentinel in ended]:
                team.remove(worker)
                worker.process.join()
                worker.tell()
                if not (code := worker.process.exitcode):
                    continue
                idle_deaths += not reap()
                if idle_deaths > MAX_IDLE_DEATHS:
                    raise UserError(f"sweep: workers end before they take a trial ({_how(code)})")
                print(f"clplat: a worker ended ({_how(code)}); another goes on with its trial", file=sys.stderr)
                start()
            reap()
        told()
    if not is_done(study.get_trials(deepcopy=False), plan):
        raise Interrupted("sweep: its workers were stopped")


class _Worker:
    """A process, and the end of a pipe on which it says what stopped it."""

    def __init__(self, plan: Plan, run: Run) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads this process has
        self.ear, mouth = context.Pipe(duplex=False)
        self.process = context.Process(target=_worker, args=(plan, run, mouth))
        self.process.start()
        mouth.close()
        self.sentinel: Any = self.process.sentinel

    def tell(self) -> None:
        """Raise what stopped it, if it said so."""
        with contextlib.suppress(EOFError, OSError):
            if self.ear.poll():
                name, faults = self.ear.recv()
                raise getattr(errors, name)(*faults)


@contextlib.contextmanager
def _team(plan: Plan, run: Run) -> Iterator[tuple[Callable[[], None], list[_Worker]]]:
    team: list[_Worker] = []
    try:
        yield lambda: team.append(_Worker(plan, run)), team
    finally:
        for worker in team:
            worker.process.terminate()  # SIGTERM: a run under way writes its checkpoint and is given back
        for worker in team:
            worker.process.join()


def _worker(plan: Plan, run: Run, mouth: Connection) -> None:
    try:
        with storage_faults(plan, opened=True):
            work(open_study(plan, None), plan, run)
    except (KeyboardInterrupt, Interrupted):
        pass  # its trial was given back
    except ClplatError as error:
        mouth.send((type(error).__name__, list(error.faults)))


@contextlib.contextmanager
def _stop_on_sigterm() -> Iterator[None]:
    """SIGTERM stops the workers too, instead of leaving them without a parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Interrupted("sweep: stopped")

    former = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _how(code: int) -> str:
    return f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
