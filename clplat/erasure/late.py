"""Requests made of a run whose stream has ended: they are kept in its folder, and belong to its stream from then on.

`RUN_DIR/requests.json` lists them, each a list of ids, in the order made. A run that is gone on with takes them up as
further forget experiences: checked by the ledger, audited, evaluated and checkpointed like those of the stream. So a
request that was interrupted is resumed by `clplat run --resume`, and is never half applied.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clplat.erasure.requests import History
from clplat.errors import UserError
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
    _write(run_dir, [*former, list(ids)])
    return len(former)


def withdraw(run_dir: Path, former: int) -> None:
    """Strike out the requests after the first `former`, which were refused before anything was changed."""
    _write(run_dir, _read(run_dir)[:former])


def extend(stream: Stream, run_dir: Path) -> int:
    """Append to a stream what was asked of the run since; how many requests. Raises UserError as the ledger does."""
    requests = _read(run_dir)
    for ids in requests:
        _append(stream, ids)
    return len(requests)


def _append(stream: Stream, ids: Sequence[str]) -> None:
    history = History(getattr(stream, "users", {}), stream.task_known)
    for experience in stream:
        history.add(experience)
    number = sum(e.kind is Kind.FORGET for e in stream)
    stream.experiences = (*stream.experiences, history.forget(f"forget-{number}", tuple(ids)))


def _read(run_dir: Path) -> list[list[str]]:
    file = run_dir / FILE
    if not file.is_file():
        return []
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        requests: list[list[str]] = content["requests"]
        whole = content["sha256"] == _digest(requests)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        whole, requests = False, []
    if not whole:
        raise UserError(
            f"{file} is damaged or was changed by hand: put it back, since the run's last requests are in it"
        )
    return requests


def _write(run_dir: Path, requests: list[list[str]]) -> None:
    write_atomic(run_dir / FILE, to_json({"requests": requests, "sha256": _digest(requests)}, indent=1))


def _digest(requests: Any) -> str:
    return hashlib.sha256(to_json(requests).encode()).hexdigest()
