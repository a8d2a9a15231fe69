"""Takes in new studies: studies.json, both figures, and the tables of README.md.

    python experiments/tuning/collect.py STUDIES

STUDIES is the folder of the studies digits_front, digits_halving and digits_hyperband. Every number comes from their
sweep.json, and the accuracies after each experience from the records of their trials' runs.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np

from clplat.files import put_parts, write_atomic

HERE = Path(__file__).parent
PRUNED = {"digits_halving": "successive halving", "digits_hyperband": "Hyperband"}
KEPT = ("study", "metrics", "seeds", "protocol", "effort", "gain", "held_out")
TRIAL = ("number", "state", "values", "params", "outcome", "default")


def accuracies(folder: Path) -> list[float]:
    """Mean accuracy on validation data over what was met so far, after each experience of a trial's run."""
    file = next(folder.glob("seed-*/summary.json"))
    rows = json.loads(file.read_text(encoding="utf-8"))["accuracy_matrix"][1:]  # the first is before training
    return [float(np.mean(row[: step + 1])) for step, row in enumerate(rows)]


def read(folder: Path) -> dict[str, Any]:
    """A study as it is kept here."""
    facts = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    run = json.loads(next(folder.glob("trial-0000/*/summary.json")).read_text(encoding="utf-8"))
    kept = {key: facts[key] for key in KEPT} | {"front": [p["number"] for p in facts["front"]]}
    kept |= {"git_commit": run["git_commit"]}
    kept["trials"] = [{key: t[key] for key in TRIAL} for t in facts["trials"]]
    if folder.name in PRUNED:
        for trial, known in zip(kept["trials"], facts["trials"], strict=True):
            trial["accuracies"] = accuracies(Path(known["folder"]))
    return kept


def front_table(study: dict[str, Any]) -> str:
    """The default and the front: where they were chosen, on held-out seeds, and what they gain there."""
    held, trials = study["held_out"], {t["number"]: t for t in study["trials"]}
    default = next(n for n, t in trials.items() if t["default"])
    lines = ["| trial | chosen by: plasticity, stability | held-out seeds: plasticity, stability "
             "| over the default, seed by seed |", "|---" * 4 + "|"]  # fmt: skip
    for number in [default, *(n for n in study["front"] if n != default)]:
        gain = held["gain"].get(str(number))
        text = "" if gain is None else ", ".join(f"{g['mean']:+.3f} ± {g['half_width']:.3f}" for g in gain)
        mark = "**" if number in held["dominating"] else ""
        name = f"{mark}{number}{mark}{', the default' if number == default else ''}"
        pairs = (trials[number]["values"], held["values"][str(number)])
        lines.append(f"| {name} | " + " | ".join(", ".join(f"{v:.3f}" for v in p) for p in pairs) + f" | {text} |")
    return "\n".join(lines)


def front_answer(study: dict[str, Any]) -> str:
    """Which points of the front are better than the default on held-out seeds, and in what beyond the interval."""
    held, effort = study["held_out"], f"Spent: {study['effort']}."
    if not held["dominating"]:
        return f"No point of the front is better than the default on the held-out seeds. {effort}"
    sure = {n: [m for m, g in zip(study["metrics"], held["gain"][str(n)], strict=True) if g["mean"] > g["half_width"]]
            for n in held["dominating"]}  # fmt: skip
    told = ", ".join(f"trial {n} (beyond the interval in {' and '.join(m) or 'neither'})" for n, m in sure.items())
    return f"Better than the default in both on the held-out seeds, in the mean: {told}. {effort}"


def pruned_table(studies: dict[str, Any]) -> str:
    """Of each pruner: after how many experiences trials were stopped, what was spent, what was found."""
    lines = ["| pruner | trials | stopped after 1, 2, 3, 4 experiences | experiences run, of | default → best |",
             "|---" * 5 + "|"]  # fmt: skip
    for name, words in PRUNED.items():
        trials = studies[name]["trials"]
        lengths = [len(t["accuracies"]) for t in trials if t["state"] == "pruned"]
        done, most = sum(len(t["accuracies"]) for t in trials), max(len(t["accuracies"]) for t in trials)
        counts = ", ".join(str(lengths.count(k)) for k in range(1, most))
        gain = studies[name]["gain"].rpartition(": ")[2].removeprefix("average_accuracy ")
        lines.append(f"| {words} | {len(trials)} | {counts} | {done} of {most * len(trials)} | {gain} |")
    return "\n".join(lines)


def draw_pruned(studies: dict[str, Any]) -> None:
    """Trials × experiences: accuracy so far; a trial that was stopped ends with a bar."""
    figure, axes = plt.subplots(1, len(PRUNED), figsize=(9, 5.5), sharey=True, layout="constrained")
    for axis, (name, words) in zip(axes, PRUNED.items(), strict=True):
        trials = studies[name]["trials"]
        most = max(len(t["accuracies"]) for t in trials)
        grid = np.full((len(trials), most), np.nan)
        for row, trial in enumerate(trials):
            grid[row, : len(trial["accuracies"])] = trial["accuracies"]
        image = axis.imshow(grid, aspect="auto", vmin=0, vmax=1, cmap="viridis")
        for row, trial in enumerate(trials):
            end = len(trial["accuracies"]) - 0.5
            if trial["state"] == "pruned":
                axis.plot([end, end], [row - 0.45, row + 0.45], color="#c22", linewidth=2.5)
        axis.set(title=words, xlabel="experiences learned", xticks=range(most), xticklabels=range(1, most + 1))
        axis.set_yticks(range(0, len(trials), 2))
    axes[0].set_ylabel("trial, in the order taken (0 is the default)")
    figure.colorbar(image, ax=axes, label="accuracy so far, validation data")
    figure.savefig(HERE / "pruned.svg", metadata={"Date": None})
    plt.close(figure)


def draw_front(study: dict[str, Any]) -> None:
    """Held-out means of the default and the front, with intervals' centres joined, over all trials as chosen by."""
    figure, axis = plt.subplots(figsize=(6.5, 4.5), layout="constrained")
    done = np.array([t["values"] for t in study["trials"] if t["values"]])
    axis.scatter(*done.T, s=14, color="#999", label="trials, on the seeds they were chosen by")
    held = study["held_out"]["values"]
    default = str(next(t["number"] for t in study["trials"] if t["default"]))
    points = np.array([held[str(n)] for n in study["front"] if str(n) != default])
    axis.scatter(*points.T, s=46, marker="s", color="#1f6fb4", label="the front, on held-out seeds")
    axis.scatter(*held[default], s=70, marker="D", color="#c22", label="the default, on held-out seeds")
    axis.axvline(held[default][0], color="#c22", linewidth=0.7, linestyle=":")
    axis.axhline(held[default][1], color="#c22", linewidth=0.7, linestyle=":")
    axis.set(xlabel="plasticity", ylabel="stability")
    axis.legend(loc="lower left", frameon=False)
    figure.savefig(HERE / "front.svg", metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("studies", type=Path)
    folder = parser.parse_args().studies
    matplotlib.use("Agg")
    plt.rcParams["svg.hashsalt"] = "clplat"
    studies = {name: read(folder / name) for name in ("digits_front", *PRUNED)}
    draw_front(studies["digits_front"])
    draw_pruned(studies)
    front = studies["digits_front"]
    parts = {"front": front_table(front), "pruned": pruned_table(studies), "answer": front_answer(front)}
    put_parts(HERE / "README.md", parts)
    rows = {name: {**s, "trials": "@"} for name, s in studies.items()}
    text = json.dumps(rows, indent=1, ensure_ascii=False)
    for study in studies.values():
        lines = ",\n".join("   " + json.dumps(t, ensure_ascii=False) for t in study["trials"])
        text = text.replace('"@"', f"[\n{lines}\n  ]", 1)
    write_atomic(HERE / "studies.json", text + "\n")


if __name__ == "__main__":
    main()
