"""Requests made of a run whose stream has ended: they are kept in its folder, and belong to its stream from then on.

`RUN_DIR/requests.json` lists them, each a list of ids, in the order made. A run that is gone on with takes them up as
further forget experiences: checked by the ledger, audited, evaluated and checkpointed like those of the stream. So a
request that was interrupted is resumed by `clplat run --resume`, and is never half applied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from clplat.erasure.requests import History
from clplat.files import to_json, write_atomic
from clplat.stream import Kind, Stream

FILE = "requests.json"


def note(run_dir: Path, stream: Stream, ids: Sequence[str]) -> int:
    """Note a request in a run's folder, having checked it against `stream`. Returns how many there were before.

    Raises:
        UserError: the ledger refuses it; nothing is changed.
    """
    former = _read(run_dir)
    _append(stream, ids)
    write_atomic(run_dir / FILE, to_json([*former, list(ids)], indent=1))
    return len(former)


def withdraw(run_dir: Path, former: int) -> None:
    """Strike out the requests after the first `former`, which were refused before anything was changed."""
    write_atomic(run_dir / FILE, to_json(_read(run_dir)[:former], indent=1))


def extend(stream: Stream, run_dir: Path) -> None:
    """Append to a stream what was asked of the run since. Raises UserError as the ledger does."""
    for ids in _read(run_dir):
        _append(stream, ids)


def _append(stream: Stream, ids: Sequence[str]) -> None:
    history = History(getattr(stream, "users", {}), stream.task_known)
    for experience in stream:
        history.add(experience)
    number = sum(e.kind is Kind.FORGET for e in stream)
    stream.experiences = (*stream.experiences, history.forget(f"forget-{number}", tuple(ids)))


def _read(run_dir: Path) -> list[list[str]]:
    file = run_dir / FILE
    return json.loads(file.read_text()) if file.is_file() else []
