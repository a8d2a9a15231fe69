"""Runs of their own for what holds runs: a study, and each of its trials. Those in their folders are nested under them.

Nothing here waits for a store: `begin` and `end` note in the folder's tracking.json what is to be sent. The first run
below that reaches the store opens those above it; what is left is sent by `send`, or later by `clplat ui`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.config.settings import TrackingSettings
from clplat.files import to_json
from clplat.tracking.client import one_line, pending, send_pending, store_of, without_password
from clplat.tracking.state import held, new_state, read_state, write_state


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
    folder.mkdir(parents=True, exist_ok=True)
    with held(folder):
        before = read_state(folder)
        if before is None or (before["uri"], before["experiment"]) != (uri, experiment):
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


def send(folder: Path) -> str | None:
    """Send all that `folder` and the runs in it have held back; one line where the store is away."""
    for run_dir in pending(folder):
        try:
            send_pending(run_dir)
        except Exception as error:  # noqa: BLE001 - whatever the store does, the study is done
            state = read_state(run_dir)
            where = "the store" if state is None else without_password(state["uri"])
            return (f"tracking: not everything reached {where} ({one_line(error)}); it is kept in {folder} and sent by "
                    "`clplat ui`")  # fmt: skip
    return None
