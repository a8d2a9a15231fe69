"""When a trial is given up: by a pruner within its first run, after each experience; or before its last seeds."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.errors import Interrupted
from clplat.metrics import summarize
from clplat.metrics.record import RunRecord
from clplat.sweep.objectives import oriented
from clplat.sweep.plan import Plan

ENOUGH = 4  # trials that are whole, before any is given up


Run = Callable[..., Mapping[str, Any]]
"""A run: (configuration in the layout of config.yaml, its folder) → contents of summary.json. Where the plan has a
pruner it is given `watch` by name, too: what a run asks after each experience (`clplat.run.state.Watch`)."""


class GivenUp(Exception):
    """A trial that is not worth what is left of it; its text says why, and `cost` what its unfinished run took."""

    def __init__(self, why: str, cost: Mapping[str, Any] | None = None) -> None:
        super().__init__(why)
        self.cost = dict(cost or {})


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


def watched(trial: Any, plan: Plan, run: Run, config: dict[str, Any], run_dir: Path, *, first: bool) -> Any:
    """The summary of a run, whose metric is reported to the pruner after each experience, if it is a trial's first.

    The default is reported too, for others to be compared with, and never stopped.

    Raises:
        GivenUp: the pruner stopped it.
    """
    if plan.pruner == "none" or not first:
        return run(config, run_dir)
    metric, stopped = plan.metrics[0], list[str]()

    def watch(record: RunRecord) -> bool:
        value, step = summarize(record)[0].get(metric), len(record.matrix) - 1
        if value is None:
            return False
        trial.report(value, step)
        if not trial.user_attrs.get("default") and trial.should_prune():
            stopped.append(f"stopped by {plan.pruner} after {step} experience{'s' * (step > 1)}: {metric} {value:.4f}")
        return bool(stopped)

    try:
        return run(config, run_dir, watch=watch)
    except Interrupted:
        if not stopped:
            raise
        cost = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))["cost"]
        raise GivenUp(stopped[0], cost) from None
