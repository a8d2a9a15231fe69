"""Continual RL over Pendulum's gravities: every arm of `pendulum.yaml`, each with the forward transfer over `alone`.

python experiments/continual_rl/measure.py OUTPUT_DIR SEED...     runs what OUTPUT_DIR/results.json does not hold
python experiments/continual_rl/measure.py results.json           prints the tables of README.md from it
"""

from __future__ import annotations

import itertools
import json
import sys
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from clplat.api import run_config
from clplat.config.resolve import expand

CONFIG, REFERENCE = "continual_rl/pendulum", "alone"
METRICS = ("final_return", "return_forgetting", "return_forward_transfer")


def main(folder: Path, seeds: list[int]) -> None:
    """`alone` first: it is what the others' forward transfer is measured against."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"experiment": CONFIG, "runs": {}}
    for seed in seeds:
        for config in expand(config=CONFIG, seeds=[seed], output=str(folder / "runs")):
            arm = config.name.rpartition("/")[2]
            found, alone = results["runs"].setdefault(arm, {}), results["runs"][REFERENCE].get(str(seed))
            if str(seed) not in found:
                reference = None if alone is None else str(folder / alone["run"])
                run = run_config(replace(config, reference=reference), quiet=True)
                found[str(seed)] = measured(run.summary) | {"run": str(run.run_dir.relative_to(folder))}
                results["measured"] = f"{datetime.now(UTC):%Y-%m-%d}"
                file.write_text(json.dumps(results, indent=1) + "\n")


def measured(summary: dict[str, Any]) -> dict[str, Any]:
    """The metrics, and the normalised return in each environment (columns) after each (rows)."""
    bounds = {e["experience"]: e["return_bounds"] for e in summary["interaction"]}
    rows = [e["after"] for e in summary["interaction"]]
    scores = [[round((row[n] - low) / (high - low), 4) for n, (low, high) in bounds.items()] for row in rows]
    return {"metrics": {m: summary["metrics"][m] for m in METRICS}, "scores": scores}


def interval(values: list[float]) -> str:
    """Mean and half the 95 % interval of Student's t, from two seeds on."""
    if len(values) < 2:
        return f"{values[0]:.2f}"
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / np.sqrt(len(values))
    return f"{np.mean(values):.2f} ± {half:.2f}"


def tables(results: dict[str, Any]) -> str:
    """Metrics of each arm with its mean matrix, and what `er` and `ewc` change in each seed against `naive`."""
    lines = [
        "| arm | seeds | final return | forgetting | forward transfer | in each, after g10; g14; g5 |",
        "|---|---|---|---|---|---|",
    ]
    for arm, runs in results["runs"].items():
        of = {m: [run["metrics"][m] for run in runs.values()] for m in METRICS}
        cells = ["—" if None in values else interval(values) for values in of.values()]
        mean = np.mean([run["scores"] for run in runs.values()], axis=0)
        matrix = "; ".join(" ".join(f"{v:.2f}" for v in row) for row in mean)
        lines.append(f"| `{arm}` | {len(runs)} | {' | '.join(cells)} | {matrix} |")
    for arm, metric in itertools.product(("er", "ewc"), METRICS):
        mine, plain = (results["runs"][name] for name in (arm, "naive"))
        of = [mine[seed]["metrics"][metric] - plain[seed]["metrics"][metric] for seed in mine if seed in plain]
        lines.append(f"{arm} less naive, {metric}: {', '.join(f'{d:.2f}' for d in of)} ({interval(of)})")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1].endswith(".json"):
        print(tables(json.loads(Path(sys.argv[1]).read_text())))
    else:
        main(Path(sys.argv[1]), [int(s) for s in sys.argv[2:]])
