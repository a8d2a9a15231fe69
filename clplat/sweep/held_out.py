"""Held-out seeds: the default and the best measured where nothing was chosen, and whether that is better."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from clplat.sweep.early import Run, means
from clplat.sweep.objectives import dominates, oriented, values_of
from clplat.sweep.plan import Plan
from clplat.sweep.trials import values

Rows = Mapping[int, Sequence[Sequence[float]]]
"""Trial → its metrics under each held-out seed, each the mean over the protocol's streams."""


def measure(trials: Sequence[Any], plan: Plan, run: Run, quiet: bool) -> Rows:
    """Run trials under the held-out seeds; runs that are complete are not repeated."""
    found: dict[int, list[list[float]]] = {}
    if plan.held_out and not quiet:
        runs = len(trials) * len(plan.cells(plan.held_out))
        print(f"on held-out seeds {plan.held_out}: {runs} runs, of the default and the best", flush=True)
    for trial in trials if plan.held_out else []:
        folder, rows = f"held-out/trial-{trial.number:04d}", []
        for stream, seed, place in plan.cells(plan.held_out):
            config = plan.config(values(trial), seed, folder, stream)
            rows.append(values_of(run(config, plan.folder / folder / place), plan.metrics))
        many = plan.runs_per_seed
        found[trial.number] = [means(rows[i : i + many]) for i in range(0, len(rows), many)]
    return found


def facts(default: int | None, rows: Rows, plan: Plan) -> dict[str, Any]:
    """For sweep.json: values of each seed, means, and each trial's gain over the default, seed by seed."""
    gains = (
        {n: _gain(rows[default], r) for n, r in rows.items() if n != default}
        if default is not None and default in rows
        else {}
    )
    return {
        "seeds": plan.held_out,
        "values": {number: means(r) for number, r in rows.items()},
        "rows": dict(rows),
        "gain": {n: [{"mean": m, "half_width": h} for m, h in spreads(g)] for n, g in gains.items()},
        "dominating": [n for n, g in gains.items() if _dominates_zero(means(g), plan)],
    }


def lines(default: int | None, rows: Rows, plan: Plan) -> list[str]:
    """What was found, a trial a line, and whether any of them is better than the default there."""
    if not rows:
        return []
    where = f"on held-out seeds {plan.held_out}, on validation data"
    told, better = [], []
    for number, own in rows.items():
        name = f"default (trial {number})" if number == default else f"trial {number}"
        text = f"{where}: {name}, {_shown(spreads(own), plan, '')}"
        if default is not None and number != default and default in rows:
            gain = _gain(rows[default], own)
            text += f"; over the default, seed by seed: {_shown(spreads(gain), plan, '+')}"
            better += [number] if _dominates_zero(means(gain), plan) else []
        told.append(text)
    if default not in rows or len(rows) < 2:
        return told
    what = "not worse in any metric and better in one" if len(plan.metrics) > 1 else "better"
    named = f"trial {', '.join(map(str, better))}" if better else "no trial"
    return [*told, f"{where}: {named} of those that are best {'are' if len(better) > 1 else 'is'} {what} than the "
                   "default, by the means"]  # fmt: skip


def spreads(rows: Sequence[Sequence[float]]) -> list[tuple[float, float | None]]:
    """Mean of each metric over seeds, and half the 95 % interval (Student's t); None of fewer than three seeds."""
    from scipy.special import stdtrit

    found = []
    for column in zip(*rows, strict=True):
        n = len(column)
        half = float(stdtrit(n - 1, 0.975)) * statistics.stdev(column) / math.sqrt(n) if n >= 3 else None
        found.append((statistics.fmean(column), half))
    return found


def _gain(default: Sequence[Sequence[float]], own: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[y - x for x, y in zip(a, b, strict=True)] for a, b in zip(default, own, strict=True)]


def _dominates_zero(gain: Sequence[float], plan: Plan) -> bool:
    return dominates(oriented(gain, plan.directions), (0.0,) * len(gain))


def _shown(found: Sequence[tuple[float, float | None]], plan: Plan, sign: str) -> str:
    shown = []
    for metric, (mean, half) in zip(plan.metrics, found, strict=True):
        digits = ".4g" if abs(mean) >= 10 else ".4f"
        shown.append(f"{metric} {mean:{sign}{digits}}" + ("" if half is None else f" ± {half:{digits}}"))
    return ", ".join(shown)
