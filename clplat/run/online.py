"""Counting predictions that are scored as the data arrive: plain sums, saved and resumed with a run.

Counts are {"correct": sum of the scores, "seen": predictions}, and for data that mix several parts also
"correct/<part>" and "seen/<part>" of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from clplat.stream import Data


def count(counts: dict[str, float], data: Data, rows: Tensor, scores: Tensor) -> None:
    """Add the scores (B,) of predictions on the samples `rows` (B,) of `data` to `counts`, in place."""
    names = data.part_names()
    for key in (f"{what}/{name}" for name in names for what in ("correct", "seen")):
        counts.setdefault(key, 0.0)  # the same keys in the same order on every process
    counts["correct"] += float(scores.sum())
    counts["seen"] += len(scores)
    if names and len(scores):
        parts = data.parts(rows)
        for number in parts.unique().tolist():
            counts[f"correct/{names[number]}"] += float(scores[parts == number].sum())
            counts[f"seen/{names[number]}"] += int((parts == number).sum())


def running_error(finished: Sequence[dict[str, Any]], counts: dict[str, float]) -> dict[str, float]:
    """Error so far, by name: in the current adapt experience, and over it and all that have finished."""
    if not counts["seen"]:
        return {}
    right, seen = (sum(c[key] for c in (*finished, counts)) for key in ("correct", "seen"))
    error = 1 - counts["correct"] / counts["seen"]
    return {"adapt/online_error": error, "adapt/running_error": 1 - right / seen}
