"""Which published figures were reached here: docs/reproduced.md, from experiments/*/results*.json and published.yaml.

A results file is an object, or a list of them: `runs`, and as far as it is known `experiment` (a shipped file),
`git_commit`, `measured` (a date). `runs` is name → seed → figures, or a list of summaries as a run writes them.
A figure is a number under the name of a metric; other entries (matrices, curves) are not read here. What no file says
stands as "not recorded": nothing here is typed by hand but what papers report, each with its source.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from clplat.config import discovery
from clplat.config.resolve import experiments
from clplat.report.compare import Estimate, bounds_of, estimate, higher_is_better, metric_info, value_of
from clplat.report.numbers import show_estimate

ROOT = Path(__file__).resolve().parents[1]
UNKNOWN = "not recorded"
# What sums up a run, the first that it has.
SUMMARY = ("h_mean", "average_accuracy", "online_error", "final_return", "normalized_return")


@dataclass(frozen=True)
class Arm:
    """Runs that differ only in their seed.

    Args:
        folder: of the experiment's file and results.
        experiment: the shipped file; None where the results do not say.
        figures: metric → seed → value.
        commits: that the results name, without repeats.
    """

    folder: str
    experiment: str | None
    name: str
    figures: dict[str, dict[str, float]]
    commits: tuple[str, ...]
    measured: str | None

    def estimate(self, metric: str) -> Estimate:
        """Mean and interval over seeds."""
        return estimate(self.figures.get(metric, {}).values(), bounds_of(metric))


def arms(folder: Path = ROOT / "experiments") -> list[Arm]:
    """All runs whose results are checked in.

    Raises:
        ValueError: a file is none of the kind above; the message says where.
    """
    found = []
    for file in sorted(folder.glob("*/results*.json")):
        content = json.loads(file.read_text(encoding="utf-8"))
        for part in content if isinstance(content, list) else [content]:
            found += _arms(file, part)
    return found


def _arms(file: Path, part: Any) -> Iterator[Arm]:
    experiment = part.get("experiment")
    if experiment is not None and experiment not in experiments():
        raise ValueError(f"{file}: experiment {experiment!r} is not shipped")
    if "runs" not in part:
        if not all(key.isdigit() for key in part):  # seed → run → curves: no figures, and none is made up
            raise ValueError(f"{file}: no runs (valid: name → seed → figures, or a list of summaries)")
        return
    for name, seeds in _by_name(part["runs"]).items():
        figures: dict[str, dict[str, float]] = {}
        for seed, run in seeds.items():
            if not seed.isdigit() or not isinstance(run, dict):
                raise ValueError(f"{file}: runs: {name}: {seed!r} is no seed with its figures")
            own = {**run, **run.get("metrics", {}), **run.get("cost", {})}
            if rounds := run.get("round_errors"):  # of equal length, as the stream repeats itself
                own = {"online_error": sum(rounds) / len(rounds), **own}
            for metric in filter(metric_info, own):
                if (value := value_of({"metrics": own}, metric)) is not None:
                    figures.setdefault(metric, {})[seed] = value
        commits = {run["git_commit"] for run in seeds.values() if run.get("git_commit")}
        commits |= {part["git_commit"]} if part.get("git_commit") and not commits else set()
        yield Arm(file.parent.name, experiment, name, figures, tuple(sorted(commits)), part.get("measured"))


def _by_name(runs: Any) -> dict[str, dict[str, Any]]:
    if isinstance(runs, dict):
        return runs
    found: dict[str, dict[str, Any]] = {}
    for run in runs:
        found.setdefault(str(run["name"]).rpartition("/")[2], {})[str(run["seed"])] = run
    return found


def published() -> dict[str, list[dict[str, Any]]]:
    """Method → what its paper reports."""
    return yaml.safe_load((ROOT / "docs" / "published.yaml").read_text(encoding="utf-8"))


def outcome(claim: Mapping[str, Any], known: list[Arm]) -> tuple[str, list[Arm]]:
    """reached, not reached, or not run here; and the runs of the paper's setting.

    Reached: the published figure is within the 95 % interval of the mean over seeds, or on its worse side; of fewer
    than three seeds, or of several runs, the mean itself is as good or better.
    """
    own = [arm for arm in known if arm.experiment == claim["experiment"] and arm.name in claim["runs"]]
    means = [mean for arm in own if (mean := arm.estimate(claim["metric"]).mean) is not None]
    if len(means) < len(claim["runs"]):
        return "not run here", own
    sign = 1 if higher_is_better(claim["metric"]) else -1
    best = sum(means) / len(means)
    if len(own) == 1:
        found = own[0].estimate(claim["metric"])
        end = found.high if sign > 0 else found.low
        best = best if end is None else end
    return ("reached" if sign * (best - claim["value"]) >= 0 else "not reached"), own


def published_rows(known: list[Arm]) -> list[list[str]]:
    """Method, setting, metric, the paper's figure and its source, ours, seeds, command, commit, outcome."""
    rows = []
    for method, claims in published().items():
        for claim in claims:
            said, own = outcome(claim, known)
            ours = "; ".join(show_estimate(arm.estimate(claim["metric"])) for arm in own) or "—"
            found = {seed for arm in own for seed in arm.figures.get(claim["metric"], {})}
            seeds = ", ".join(sorted(found, key=int)) or "—"
            commits = _commits({c for arm in own for c in arm.commits}) if own else "—"
            metric, command = claim["metric"].replace("_", " "), f"`clplat run {claim['experiment']}`"
            rows.append([f"`{method}`", claim["what"], metric, f"{claim['value']:.3f}", claim["source"], ours, seeds,
                         command, commits, said])  # fmt: skip
    return rows


def measured_rows(known: list[Arm]) -> list[list[str]]:
    """Experiment, run, seeds, figure, commit of all that was run."""
    rows = []
    for arm in known:
        metric = next((m for m in SUMMARY if m in arm.figures), None)
        if metric is None:
            continue
        command = f"`clplat run {arm.experiment}`" if arm.experiment else f"{UNKNOWN} ({arm.folder})"
        rows.append([command, f"`{arm.name}`", ", ".join(arm.figures[metric]), metric.replace("_", " "),
                     show_estimate(arm.estimate(metric)), _commits(arm.commits), arm.measured or UNKNOWN])  # fmt: skip
    return rows


def without() -> list[str]:
    """Strategies of which no published figure is known here."""
    return [name for name in discovery.entries("strategies") if name not in published()]


def _commits(commits: Any) -> str:
    return ", ".join(f"`{c[:7]}`" for c in sorted(commits)) or UNKNOWN
