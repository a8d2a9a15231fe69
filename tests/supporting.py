"""The support matrix: tests say which cell they have seen; `make support` writes them down, any other run compares.

A cell is of a strategy and a column of `clplat list strategies --support`: true where it was seen, or why it is not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FILE = Path(__file__).parents[1] / "clplat" / "commands" / "support.json"
RECORDING = os.environ.get("CLPLAT_SUPPORT") == "record"
RECORD: dict[str, dict[str, Any]] = json.loads(FILE.read_text(encoding="utf-8")) if FILE.is_file() else {}
Seen = Callable[..., None]  # (strategy, column, why not)

_found: dict[str, dict[str, Any]] = {}


@pytest.fixture
def seen(record_property: Callable[[str, object], None]) -> Seen:
    """Says that a strategy was seen to do what a column asks, or why it does not."""

    def say(name: str, column: str, why: str = "") -> None:
        record_property("support", [name, column, why])
        if not RECORDING:
            recorded = RECORD.get(name, {}).get(column)
            assert (recorded is True) == (not why), f"{name}, {column}: recorded {recorded!r}: run make support"

    return say


def pytest_runtest_logreport(report: Any) -> None:
    if RECORDING and report.when == "call" and not report.failed:
        for key, value in report.user_properties:
            if key == "support":
                name, column, why = value
                _found.setdefault(name, {})[column] = why or True


def pytest_sessionfinish(session: Any) -> None:
    if not RECORDING or hasattr(session.config, "workerinput") or not _found:
        return
    from clplat.commands.support import COLUMNS

    known = {name: RECORD.get(name, {}) | cells for name, cells in _found.items()}
    rows = {name: {c: cells[c] for c in COLUMNS if c in cells} for name, cells in sorted((RECORD | known).items())}
    FILE.write_text(json.dumps(rows, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
