"""Numbers behind the figures: matrices and curves, averaged over the seeds of a group."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from clplat.report.compare import Bounds, Estimate, Group, bounds_of, estimate
from clplat.report.spec import Series

FRACTION: Bounds = (0, 1)
# Points drawn per curve: more cannot be told apart on a screen.
_BINS = 200


@dataclass
class Log:
    """metrics.jsonl of one run.

    Args:
        steps: name → [(optimisation step, value)].
        experiences: name → {experiences finished: value}.
        ends: optimisation step at which each experience ended.
    """

    steps: dict[str, list[tuple[float, float]]] = field(default_factory=dict)
    experiences: dict[str, dict[int, float]] = field(default_factory=dict)
    ends: list[float] = field(default_factory=list)


def read_log(run: dict[str, Any]) -> Log:
    """The run's metrics.jsonl; empty without one. A line cut off by a crash ends it."""
    log, step = Log(), 0.0
    for entry in _entries(run):
        values = {k: float(v) for k, v in entry["metrics"].items() if _number(v)}
        if entry["axis"] == "step":
            step = float(entry["step"])
            for name, value in values.items():
                log.steps.setdefault(name, []).append((step, value))
        else:
            for name, value in values.items():
                log.experiences.setdefault(name, {})[int(entry["step"])] = value
            if step and (not log.ends or step > log.ends[-1]):
                log.ends.append(step)
    return log


def _entries(run: dict[str, Any]) -> Iterator[dict[str, Any]]:
    if run.get("run_dir") is None:
        return
    path = Path(run["run_dir"]) / "metrics.jsonl"
    if not path.exists():
        return
    with path.open() as lines:
        for line in lines:
            try:
                entry = json.loads(line)
                yield {"axis": entry["axis"], "step": entry["step"], "metrics": entry["metrics"]}
            except (ValueError, KeyError, TypeError):
                return


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def longest_experiences(groups: list[Group]) -> list[dict[str, Any]]:
    """The stream's experiences as the run that knows most of them tells them."""
    return max((run.get("experiences") or [] for group in groups for run in group.runs), key=len, default=[])


def titles(groups: Sequence[Group]) -> list[str]:
    """What each experience of a stream is called: by its title, where all runs give it that, or else by its name.

    Runs of several seeds may have drawn the classes of an experience each for itself. Where several have one title, as
    where classes return, it stands behind the name.
    """
    known = [run.get("experiences") or [] for group in groups for run in group.runs]
    names = [str(e.get("name")) for e in longest_experiences(list(groups))]
    said = [{str(run[j].get("title") or "") for run in known if j < len(run)} for j in range(len(names))]
    found = []
    for own, name in zip(said, names, strict=True):
        title = next(iter(own)) if len(own) == 1 else ""
        alone = said.count(own) == 1 and title not in names
        found.append(name if not title else title if alone else f"{name} ({title})")
    return found


def scored(group: Group) -> list[int]:
    """Columns of a group's accuracy matrices that have a number."""
    rows = [row for run in group.counted for row in run.get("accuracy_matrix") or []]
    return sorted({j for row in rows for j, value in enumerate(row) if value is not None and _number(value)})


def mean_matrix(group: Group, rows: Sequence[int] | None = None, columns: Sequence[int] | None = None
                ) -> list[list[Estimate]]:  # fmt: skip
    """Accuracy matrix of a group: cell by cell over its seeds; rows of an interrupted run that are missing stay out.

    Args:
        rows, columns: those wanted, of those that there are; None: all.
    """
    matrices = [run.get("accuracy_matrix") or [] for run in group.counted]
    height = max(map(len, matrices), default=0)
    width = max((len(row) for matrix in matrices for row in matrix), default=0)

    def cell(matrix: list[list[float | None]], i: int, j: int) -> float | None:
        value = matrix[i][j] if i < len(matrix) and j < len(matrix[i]) else None
        return value if _number(value) else None

    across = [j for j in (range(width) if columns is None else columns) if j < width]
    down = [i for i in (range(height) if rows is None else rows) if i < height]
    return [[estimate([cell(m, i, j) for m in matrices], FRACTION) for j in across] for i in down]


def series(index: int, label: str, x: list[float], values: list[Estimate]) -> Series | None:
    """A line through those estimates that exist, and of two seeds through each seed's; None if there are none."""
    kept = [(a, v) for a, v in zip(x, values, strict=True) if v.mean is not None]
    if not kept:
        return None
    means, lows, highs = ([getattr(v, end) for _, v in kept] for end in ("mean", "low", "high"))
    several = [(a, v.seeds) for a, v in kept if v.seeds]
    seeds = [[(a, own[k]) for a, own in several] for k in range(2)] if several and all(h is None for h in highs) else []
    return Series(index, label, [a for a, _ in kept], means, lows, highs, seeds)


def average_curve(index: int, group: Group, logs: list[Log]) -> Series | None:
    """Average accuracy after each experience, as logged; without a log, over the learn experiences met so far."""
    logged = [log.experiences.get("average_accuracy") or {} for log in logs]
    if not any(logged):
        logged = [_average_accuracy(run) for run in group.counted]
    x = sorted({i for values in logged for i in values})
    return series(
        index, group.label, [float(i) for i in x], [estimate([v.get(i) for v in logged], FRACTION) for i in x]
    )


def _average_accuracy(run: dict[str, Any]) -> dict[int, float]:
    learn = [j for j, e in enumerate(run.get("experiences") or []) if e.get("kind", "learn") == "learn"]
    found = {}
    for i, row in enumerate(run.get("accuracy_matrix") or []):
        met = [row[j] for j in learn if j < i and j < len(row) and _number(row[j])]
        if met:
            found[i] = float(np.mean(met))
    return found


def list_curve(index: int, group: Group, name: str) -> Series | None:
    """A quantity of `representation` after each experience."""
    lists = [(run.get("representation") or {}).get(name) or [] for run in group.counted]
    length = max(map(len, lists), default=0)
    found = [[v[i] if i < len(v) and _number(v[i]) else None for v in lists] for i in range(length)]
    values = [estimate(own, bounds_of(name)) for own in found]
    return series(index, group.label, [float(i + 1) for i in range(length)], values)


def step_curve(index: int, group: Group, name: str, logs: list[Log]) -> Series | None:
    """A quantity over optimisation steps."""
    bounds = FRACTION if name.startswith(("anytime/", "adapt/")) else (None, None)
    return seeds_curve(index, group.label, [log.steps[name] for log in logs if log.steps.get(name)], bounds)


def seeds_curve(
    index: int, label: str, seeds: Sequence[Sequence[Sequence[float]]], bounds: Bounds = (None, None)
) -> Series | None:
    """The mean of lines through the (x, y) of each seed.

    Beyond 200 values of x a point is the mean of a bin. Each seed is read between its own points by linear
    interpolation, never beyond them.
    """
    curves = [np.array(seed, dtype=float) for seed in seeds if len(seed)]
    if not curves:
        return None
    low, high = min(c[:, 0].min() for c in curves), max(c[:, 0].max() for c in curves)
    grid = np.unique(np.concatenate([c[:, 0] for c in curves]))
    if len(grid) > _BINS:
        edges = np.linspace(low, high, _BINS + 1)
        curves = [_binned(curve, edges) for curve in curves]
        grid = np.unique(np.concatenate([c[:, 0] for c in curves]))
    inside = [(grid >= c[:, 0].min()) & (grid <= c[:, 0].max()) for c in curves]
    read = [np.interp(grid, c[:, 0], c[:, 1]) for c in curves]
    found = [[float(r[k]) for r, i in zip(read, inside, strict=True) if i[k]] for k in range(len(grid))]
    values = [estimate(own, bounds) for own in found]
    return series(index, label, grid.tolist(), values)


def _binned(curve: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Mean value of each bin of steps that has points, at the bin's middle. (points, 2) → (bins, 2)"""
    bins = np.clip(np.searchsorted(edges, curve[:, 0], side="right") - 1, 0, len(edges) - 2)
    counts = np.bincount(bins, minlength=len(edges) - 1)
    sums = np.bincount(bins, weights=curve[:, 1], minlength=len(edges) - 1)
    filled = counts > 0
    return np.stack([((edges[:-1] + edges[1:]) / 2)[filled], sums[filled] / counts[filled]], axis=1)
