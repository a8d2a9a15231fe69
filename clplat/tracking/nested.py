"""Runs of their own for what holds runs: a study, and each of its trials. Those in their folders are nested under them.

Nothing here waits for a store: `begin` and `end` note in the folder's tracking.json what is to be sent. The first run
below that reaches the store opens those above it; what is left is sent by `send`, or later by `clplat ui`.
"""

from __future__ import annotations

import collections
import contextlib
import math
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.config.settings import TrackingSettings
from clplat.files import to_json
from clplat.tracking.client import (
    SAID_SECONDS,
    environment,
    one_line,
    pending,
    send_pending,
    store_of,
    without_password,
)
from clplat.tracking.state import held, new_state, read_state, write_state

TOGETHER = 8  # runs sent to a server at a time
LONGEST_SECONDS = 120.0  # that a study which is done waits for a server


def begin(
    folder: Path, settings: TrackingSettings, output: str | Path, kind: str, name: str, tags: Mapping[str, str]
) -> None:
    """Have runs in `folder` nested under one of its own; a second call does nothing.

    Args:
        settings: of the runs in it.
        output: theirs.
        kind: study or trial.
        name: shown in the list of runs.
    """
    if not settings.enabled:
        return
    uri, experiment = store_of(settings, output)
    if _is_begun(folder, uri, experiment):  # asked without the lock, which a slow store may hold
        return
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        if not _is_begun(folder, uri, experiment):
            own = {**settings.tags, **tags, "clplat.kind": kind}
            write_state(folder, {**new_state(uri, experiment, name, {}, own, started=time.time()), "nests": True})


def end(
    folder: Path,
    status: str,
    *,
    params: Mapping[str, Any],
    metrics: Mapping[str, float],
    tags: Mapping[str, str],
    artifacts: Sequence[Path] = (),
    ended: float | None = None,
) -> None:
    """Note how it ended; does nothing where it was not begun.

    Args:
        status: FINISHED, FAILED or KILLED.
        artifacts: files and folders in `folder`.
        ended: seconds since 1970; None is now.
    """
    if read_state(folder) is None:
        return
    with held(folder):
        state = read_state(folder)
        assert state is not None
        state["params"] = {k: v if isinstance(v, str) else to_json(v) for k, v in params.items()}
        state["tags"] |= {k: v[:5000] for k, v in tags.items()}
        finish = {"status": status, "artifacts": [str(a.relative_to(folder)) for a in artifacts],
                  "time": ended or time.time(), "metrics": dict(metrics)}  # fmt: skip
        write_state(folder, {**state, "described": False, "done": False, "finish": finish})


def _is_begun(folder: Path, uri: str, experiment: str) -> bool:
    before = read_state(folder)
    return before is not None and (before["uri"], before["experiment"]) == (uri, experiment)


def send(folder: Path) -> str | None:
    """Send all that `folder` and the runs in it have held back; one line where something could not be.

    A server gets several runs at a time, for two minutes at most: one that is slow shall not keep a study that is done.
    Ctrl-C ends the wait, too.
    """
    waiting = pending(folder)
    if not waiting:
        return None
    state = read_state(waiting[0])
    uri = "the store" if state is None else state["uri"]
    remote = not uri.startswith("sqlite")
    left, problems = collections.deque(waiting), list[str]()

    def work() -> None:
        while left and not problems:
            with contextlib.suppress(IndexError):  # another took the last
                run_dir = left.popleft()
                try:
                    send_pending(run_dir)
                except Exception as error:  # noqa: BLE001 - whatever the store does, the study is done
                    problems.append(one_line(error))

    where, threads = without_password(uri), [threading.Thread(target=work, daemon=True) for _ in range(TOGETHER)]
    environment.enter()  # here, and not first by one of the threads
    try:
        for thread in threads if remote else threads[:1]:
            thread.start()
        problems += _wait(threads, problems, LONGEST_SECONDS if remote else math.inf, f"{len(waiting)} runs to {where}")
    except KeyboardInterrupt:
        problems.append("the wait was ended by Ctrl-C")
    finally:
        environment.leave()
    if not problems:
        return None
    return f"tracking: not everything reached {where} ({problems[0]}); it is kept in {folder} and sent by `clplat ui`"


def _wait(threads: Sequence[threading.Thread], problems: Sequence[str], seconds: float, what: str) -> list[str]:
    """Wait until all have ended or one has met a problem; why it waited no longer."""
    begun, said = time.monotonic(), False
    while not problems and (alive := [thread for thread in threads if thread.is_alive()]):
        gone = time.monotonic() - begun
        if gone >= seconds:
            return [f"it took longer than {seconds:g} s"]
        if gone > SAID_SECONDS and not said:
            said = True
            print(f"tracking: sending what is left of {what} (Ctrl-C: later)", file=sys.stderr, flush=True)
        alive[0].join(0.2)
    return []
