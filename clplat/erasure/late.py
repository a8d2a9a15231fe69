"""Requests made of a run whose stream has ended: they are kept in its folder, and belong to its stream from then on.

`RUN_DIR/requests.json` lists them, each a list of ids, in the order made. A run that is gone on with takes them up as
further forget experiences: checked by the ledger, audited, evaluated and checkpointed like those of the stream. So a
request that was interrupted is resumed by `clplat run --resume`, and is never half applied.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clplat.config.discovery import load as load_part
from clplat.config.resolve import resolve
from clplat.erasure.requests import History
from clplat.errors import UserError
from clplat.files import to_json, write_atomic
from clplat.metrics.record import ExperienceRecord
from clplat.run import checkpoint
from clplat.run.build import build_stream
from clplat.strategy import check_kinds
from clplat.stream import Kind, Stream

if TYPE_CHECKING:
    from clplat.run.runner import Runner

FILE = "requests.json"


def add(run_dir: Path, ids: Sequence[str]) -> int:
    """Note a request in the folder of a finished run, having checked it. Returns how many there were before.

    Raises:
        UserError: no finished run; a strategy that can't erase; a request that the ledger refuses. Nothing is changed.
    """
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"forget: {run_dir} is no run directory (config.yaml is missing in it)")
    config = resolve(config=run_dir / "config.yaml")
    if faults := check_kinds(load_part("strategies", config.strategy.name), [Kind.FORGET]):
        raise UserError(*faults)
    with checkpoint.lock(run_dir):
        state, notes = checkpoint.load_newest(run_dir / "checkpoints")
        stream, former = build_stream(config), _read(run_dir)
        extend(stream, run_dir)
        if state is None or state["progress"]["experience"] < len(stream):
            way = f"go on with it first (clplat run --resume {run_dir})"
            raise UserError(f"forget: {run_dir} is not finished: {way}", *notes)
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


def measure(runner: Runner, facts: Sequence[ExperienceRecord]) -> None:
    """Give requests that a restored record does not know yet a column, measured in the row that they start from.

    Args:
        facts: of all experiences of the runner's stream.
    """
    record = runner.record
    if len(record.experiences) < len(facts):
        record.experiences += facts[len(record.experiences) :]
        for row in record.matrix:
            row += [None] * (len(facts) - len(row))
        record.matrix[-1] = runner._evaluate()


def _append(stream: Stream, ids: Sequence[str]) -> None:
    history = History(getattr(stream, "users", {}), stream.task_known)
    for experience in stream:
        history.add(experience)
    number = sum(e.kind is Kind.FORGET for e in stream)
    stream.experiences = (*stream.experiences, history.forget(f"forget-{number}", tuple(ids)))


def _read(run_dir: Path) -> list[list[str]]:
    file = run_dir / FILE
    return json.loads(file.read_text()) if file.is_file() else []
