"""The tables of README.md from what `reduced.py` has measured.

    python experiments/wsrl/tables.py pendulum|hopper RESULTS_FILE

Of each arm, over the seeds that have run it: mean with half the 95 % interval (Student's t) from two seeds on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from clplat.config.resolve import resolve

COLUMNS = ("start", "dip", "area", "mean return", "last three", "TD")


def measured(curve: dict[str, Any], first_update: int) -> dict[str, float]:
    """The columns, of one curve: see README.md."""
    steps, returns = np.array(curve["env_step"]), np.array(curve["return"])
    keep = np.append(np.diff(steps) > 0, True)  # the last evaluation may stand twice
    error, returns = np.array(curve["probe_td_error"])[keep], returns[keep]
    start = curve.get("start", returns[0])  # not noted for Pendulum, whose first evaluation comes before any update
    lost = np.maximum(0, start - returns)
    largest = error[steps[keep] > first_update].max()
    values = (start, lost.max(), lost.mean(), returns.mean(), returns[-3:].mean(), largest)
    return dict(zip(COLUMNS, map(float, values), strict=True))


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval."""
    mean = f"{np.mean(values):.0f}"
    if len(values) < 2:
        return mean
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{mean} ± {half:.0f}"


def main(task: str, results: dict[str, Any]) -> None:
    """Print the table, and what warm-up changes in each seed."""
    options, names = (
        resolve(config=f"wsrl/{task}").strategy.options,
        list(dict.fromkeys(a for r in results.values() for a in r)),
    )
    found: dict[str, dict[str, dict[str, float]]] = {}
    for arm in names[1:]:  # the first is the offline phase
        first = options["batch"] if arm in ("no_warmup", "cal_ql") else options["warmup_steps"]
        found[arm] = {seed: measured(run[arm], first) for seed, run in results.items() if arm in run}
    print("offline:", ", ".join(f"{run['offline']['return'][-1]:.0f}" for run in results.values()))
    print(f"| arm | seeds | {' | '.join(COLUMNS)} |\n|{'---|' * (2 + len(COLUMNS))}")
    for arm, seeds in found.items():
        of = {column: [values[column] for values in seeds.values()] for column in COLUMNS}
        cells = [interval(of[column]) for column in COLUMNS[:-1]] + [f"{np.median(of['TD']):.3f}"]
        print(f"| `{arm}` | {len(seeds)} | {' | '.join(cells)} |")
    both = [s for s in found.get("wsrl", {}) if s in found["no_warmup"]]
    without, with_ = ([found[arm][s] for s in both] for arm in ("no_warmup", "wsrl"))
    ratios = [a["TD"] / b["TD"] for a, b in zip(without, with_, strict=True)]
    dips = [b["dip"] - a["dip"] for a, b in zip(without, with_, strict=True)]
    print("TD without warm-up / with:", ", ".join(f"{r:.2f}" for r in ratios), f"(median {np.median(ratios):.2f})")
    print("dip with warm-up less without:", ", ".join(f"{d:.0f}" for d in dips), f"({interval(dips)})")
    for arm, seeds in found.items():
        for column in ("mean return", "dip") if arm != "wsrl" else ():
            of = [values[column] - seeds[s][column] for s, values in found.get("wsrl", {}).items() if s in seeds]
            print(f"{column} of wsrl less {arm}:", ", ".join(f"{d:.0f}" for d in of), f"({interval(of)})")


if __name__ == "__main__":
    main(sys.argv[1], json.loads(Path(sys.argv[2]).read_text()))
