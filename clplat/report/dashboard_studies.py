"""Studies as their trials' runs tell them: for a store, and for a study that is under way and has no sweep.json yet."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from clplat.config.settings import flat
from clplat.report.compare import value_of
from clplat.report.naming import labels

SWEEP = "sweep"  # tag of a trial's run, with the study's name; beside it what the study is judged by, and its protocol
OBJECTIVES, PROTOCOL = "sweep_objectives", "sweep_protocol"
_PARTS = ("strategy", "backbone", "head", "merge", "loop")


def studies_of(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What sweep.json would say, as far as it can be known from the runs; those of a sweep too old to tag are left out.

    A trial's values are means over its complete runs. One with fewer of these than another has no figure yet, or was
    stopped early: it is counted, not drawn.
    """
    trials = sorted((r for r in runs if OBJECTIVES in r["tags"]), key=lambda r: r["tags"][SWEEP])
    return [_study(name, list(own)) for name, own in groupby(trials, key=lambda r: r["tags"][SWEEP])]


def _study(name: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    objectives = [part.partition(":") for part in runs[0]["tags"][OBJECTIVES].split()]
    metrics, directions = [o[0] for o in objectives], [o[2] for o in objectives]
    by_trial: dict[int, list[dict[str, Any]]] = {}
    for run in runs:  # held-out runs have another name
        if match := re.fullmatch(rf"{re.escape(name)}-trial-(\d+)", str(run["config"].get("name"))):
            by_trial.setdefault(int(match[1]), []).append(run)
    complete = {n: [r for r in own if r.get("status") == "complete"] for n, own in by_trial.items()}
    most = max(map(len, complete.values()), default=0)
    whole = {n: own for n, own in complete.items() if own and len(own) == most}
    options = [flat({k: v for k, v in own[0]["config"].items() if k in _PARTS}) for own in whole.values()]
    named = labels([""] * len(whole), options)
    rows = []
    for (number, own), params in zip(whole.items(), named, strict=True):
        found = [[value_of(run, metric) for run in own] for metric in metrics]
        if all(v is not None for row in found for v in row):
            rows.append({"number": number, "values": [sum(row) / len(row) for row in found],  # type: ignore[arg-type]
                         "params": {}, "label": params.strip(" ()")})  # fmt: skip
    spent = sum((run.get("cost") or {}).get(k) or 0 for run in runs for k in ("train_seconds", "eval_seconds"))
    effort = (
        f"{len(by_trial)} trials, {len(runs)} runs, {spent:.0f} s in training and evaluation; {len(rows)} trials have "
        "all their runs"
    )
    return {"study": name, "metrics": metrics, "protocol": runs[0]["tags"].get(PROTOCOL), "effort": effort,
            "front": _front(rows, directions), "trials": rows}  # fmt: skip


def _front(rows: Sequence[dict[str, Any]], directions: Sequence[str]) -> list[dict[str, Any]]:
    """Those that no other is at least as good as in all, and better in one."""
    signs = [1 if d == "maximize" else -1 for d in directions]
    points = [[s * v for s, v in zip(signs, row["values"], strict=True)] for row in rows]

    def beaten(p: list[float]) -> bool:
        return any(q != p and all(b >= a for a, b in zip(p, q, strict=True)) for q in points)

    return [row for row, p in zip(rows, points, strict=True) if not beaten(p)]
