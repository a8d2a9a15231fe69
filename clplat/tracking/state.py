"""tracking.json: what of a run has been sent, and which runs are nested under it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.files import to_json, write_atomic
from clplat.package import __version__

_LEVELS = 5  # of folders between a run and its study: trial, "held-out", stream, seed


def new_state(
    uri: str,
    experiment: str,
    run_name: str,
    params: Mapping[str, Any],
    tags: Mapping[str, str],
    *,
    started: float,
    datasets: Sequence[tuple[str, str]] = (),
) -> dict[str, Any]:
    """Of a run of which nothing has been sent."""
    return {
        "key": uuid.uuid4().hex,
        "uri": uri,
        "experiment": experiment,
        "started": started,
        "run_name": run_name,
        "params": {k: v if isinstance(v, str) else to_json(v) for k, v in params.items()},
        "tags": {k: str(v)[:5000] for k, v in {**tags, "clplat": __version__}.items()},
        "datasets": [list(d) for d in datasets],
        "run_id": None,
        "model_id": None,
        "offset": 0,
        "tail": "",
        "described": False,
        "finish": None,
        "done": False,
    }


def read_state(run_dir: Path) -> dict[str, Any] | None:
    """Contents of tracking.json, or None if there is none."""
    try:
        state = json.loads((run_dir / "tracking.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return state if isinstance(state, dict) and "run_id" in state else None


def write_state(run_dir: Path, state: Mapping[str, Any]) -> None:
    """Write tracking.json."""
    # A full disk or a removed run directory is the run's trouble to report, not tracking's.
    with contextlib.suppress(OSError):
        write_atomic(run_dir / "tracking.json", to_json(state))


def parent_of(run_dir: Path, state: Mapping[str, Any]) -> Path | None:
    """The nearest folder above that was begun as a study or a trial in the same experiment; None for most runs."""
    for folder in run_dir.parents[:_LEVELS]:
        above = read_state(folder)
        if above and above.get("nests") and all(above[k] == state[k] for k in ("uri", "experiment")):
            return folder
    return None


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Let one process or thread at a time open the run of a folder."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
