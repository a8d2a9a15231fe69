"""What is read of runs: comparisons over seeds, tables, figures, pages, the erasure report.

May import the contract, `config`, `metrics`, `erasure` and the files of a run (`run`). Needs no torch for runs without
requests to forget.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from clplat.package import Door

if TYPE_CHECKING:
    from pathlib import Path

    from clplat.metrics.record import RunRecord
    from clplat.report.write import report_command as report_command
    from clplat.report.write import write_report as write_report


def __getattr__(name: str) -> Any:
    if name not in ("report_command", "write_report"):
        raise AttributeError(f"module 'clplat.report' has no attribute {name!r}")
    return getattr(importlib.import_module("clplat.report.write"), name)


def report_run(run_dir: Path, record: RunRecord, oracle: str | None) -> list[Path]:
    """As in `clplat.report.write`, which is imported when a run has ended: what it needs would delay the first step."""
    from clplat.report import write

    return write.report_run(run_dir, record, oracle)


function_in = "clplat.api"
sys.modules[__name__].__class__ = Door
