"""What a sweep is judged by: one metric or two, which way each is better, and which of two such bests is taken."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from clplat.config.discovery import did_you_mean
from clplat.metrics.catalogue import METRICS

BALANCED = "balanced"
_DIRECTIONS = ("maximize", "minimize")


def read_objectives(given: Mapping[str, Any], faults: list[str]) -> tuple[list[str], list[str]]:
    """Metrics and directions of a `sweep:` section; each direction is the metric's better one, which is the default."""
    metrics, directions = (_listed(given.get(k, d)) for k, d in (("metric", "average_accuracy"), ("direction", None)))
    before = len(faults)
    for metric in metrics:
        faults += _metric_faults(metric)
    if len(faults) == before and len(set(metrics)) < len(metrics):
        faults.append(f"sweep.metric: {metrics[0]} is named twice")
    if not 1 <= len(metrics) <= 2:
        faults.append(f"sweep.metric: {len(metrics)} metrics are named (valid: one, or a list of two)")
    wrong = [d for d in directions if d not in (None, *_DIRECTIONS)]
    faults += [f"sweep.direction: {d!r} is not valid (valid: {', '.join(_DIRECTIONS)})" for d in wrong]
    if directions != [None] and len(directions) != len(metrics):
        faults.append(f"sweep.direction: {len(directions)} for {len(metrics)} metrics (valid: one for each)")
    if len(faults) > before:
        return ["average_accuracy"], ["maximize"]
    asked = directions * len(metrics) if directions == [None] else directions
    return metrics, [_direction(m, d, faults) for m, d in zip(metrics, asked, strict=True)]


def read_choice(given: Any, metrics: Sequence[str], faults: list[str]) -> str:
    """Which point of a front is the best; a fault where there is no front."""
    if given is None:
        return BALANCED
    valid = (BALANCED, *metrics)
    if len(metrics) < 2:
        faults.append("sweep.choose: has no meaning with one metric (it takes a point of the front of two)")
    elif given not in valid:
        faults.append(f"sweep.choose: {given!r} is not valid (valid: {', '.join(valid)})")
    return str(given)


def values_of(summary: Mapping[str, Any], metrics: Sequence[str]) -> list[float]:
    """The metrics of one run.

    Raises:
        ValueError: one could not be measured, with the reason.
    """
    found = []
    for metric in metrics:
        group = METRICS[metric].group
        value = summary.get(group, {}).get(metric)
        if value is None or not math.isfinite(value):
            key = metric if group == "metrics" else f"{group}.{metric}"
            raise ValueError(f"{metric} is {value}: {summary.get('why_null', {}).get(key, 'not measured')}")
        found.append(float(value))
    return found


def oriented(values: Sequence[float], directions: Sequence[str]) -> tuple[float, ...]:
    """Values of which higher ones are better."""
    return tuple(v if d == "maximize" else -v for v, d in zip(values, directions, strict=True))


def dominates(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether oriented values a are nowhere worse than b, and somewhere better."""
    return all(x >= y for x, y in zip(a, b, strict=True)) and tuple(a) != tuple(b)


def front(points: Sequence[Sequence[float]], directions: Sequence[str]) -> list[int]:
    """Positions of the points that no other dominates, best by the first metric first; equal ones count once."""
    known = [oriented(p, directions) for p in points]
    best = [i for i, p in enumerate(known) if p not in known[:i] and not any(dominates(q, p) for q in known)]
    return sorted(best, key=lambda i: known[i], reverse=True)


def choose(points: Sequence[Sequence[float]], metrics: Sequence[str], directions: Sequence[str], how: str) -> int:
    """Position of the best point of a front: by one metric, or balanced.

    Balanced is nearest to the point that has the best of both, each metric measured in widths of the front; of several
    as near, the first.
    """
    known = [oriented(p, directions) for p in points]
    if how != BALANCED:
        return max(range(len(known)), key=lambda i: known[i][list(metrics).index(how)])
    top, low = ([f(p[k] for p in known) for k in range(len(metrics))] for f in (max, min))
    widths = [(t - b) or 1.0 for t, b in zip(top, low, strict=True)]
    return min(range(len(known)), key=lambda i: sum(((t - x) / w) ** 2 for t, x, w in zip(top, known[i], widths,
                                                                                          strict=True)))  # fmt: skip


def check_kinds(metrics: Sequence[str], kinds: set[str]) -> list[str]:
    """Faults of metrics that need kinds of experience which a stream has not."""
    found = []
    for metric in metrics:
        needed = METRICS[metric].kinds
        if kinds and needed and not kinds & set(needed):
            there, wanted = ", ".join(sorted(kinds)), " or ".join(needed)
            found.append(f"sweep.metric: {metric} needs {wanted} experiences, but the stream has {there} only")
    return found


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _metric_faults(metric: Any) -> list[str]:
    """A metric must be one number a run: a metric or a cost."""
    if not isinstance(metric, str):
        return [f"sweep.metric: {metric!r} is not the name of a metric (valid: see `clplat list metrics`)"]
    own = [name for name, info in METRICS.items() if info.group != "representation"]
    if metric in own:
        return []
    what = f"{metric!r} is no figure of a whole run" if metric in METRICS else f"no metric {metric!r}"
    return [f"sweep.metric: {what}{did_you_mean(metric, own) or ' (valid: see `clplat list metrics`)'}"]


def _direction(metric: str, asked: str | None, faults: list[str]) -> str:
    higher = METRICS[metric].higher_is_better
    if higher is None:
        if asked is None:
            faults.append(f"sweep.direction: is needed: neither end of {metric} is good as such")
        return asked or "maximize"
    better = "maximize" if higher else "minimize"
    if asked not in (None, better):
        faults.append(f"sweep.direction: {asked} would choose the worst {metric} (valid: {better})")
    return better
