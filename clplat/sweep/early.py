"""When a trial of several seeds is given up before its last one."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from clplat.sweep.objectives import oriented
from clplat.sweep.plan import Plan

ENOUGH = 4  # trials that are whole, before any is given up


class GivenUp(Exception):
    """A trial that is not worth its remaining seeds; its text says why."""


def hopeless(study: Any, plan: Plan, rows: Sequence[Sequence[float]]) -> str:
    """Why a trial need not go on; empty where it may.

    It is worse in every metric than the median of the whole trials, all measured by the same seeds: those of `rows`.

    Args:
        rows: of each run so far, its metrics.
    """
    if plan.give_up == "never" or len(rows) % plan.runs_per_seed or len(rows) == len(plan.cells()):
        return ""
    whole = [t.user_attrs["rows"] for t in study.get_trials(deepcopy=False)
             if t.state.name == "COMPLETE" and "rows" in t.user_attrs]  # fmt: skip
    if len(whole) < ENOUGH:
        return ""
    mine = means(rows)
    median = [statistics.median(column) for column in zip(*(means(r[: len(rows)]) for r in whole), strict=True)]
    better = zip(oriented(mine, plan.directions), oriented(median, plan.directions), strict=True)
    if any(x >= y for x, y in better):
        return ""
    done, shown = len(rows) // plan.runs_per_seed, zip(plan.metrics, mine, median, strict=True)
    figures = ", ".join(f"{metric} {x:.4f}, median {y:.4f}" for metric, x, y in shown)
    return f"given up after {done} of {len(plan.seeds)} seeds: {figures}"


def means(rows: Sequence[Sequence[float]]) -> list[float]:
    """The mean of each metric over runs."""
    return [sum(column) / len(column) for column in zip(*rows, strict=True)]
