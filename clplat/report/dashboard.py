"""What a dashboard shows of runs: those asked for, by stream, ranked and drawn.

Groups, means, intervals and tests are those of `compare`, so a dashboard never says another number than a report does.
Runs that did not complete are counted and named, and enter no mean that a complete one is in; a group without any
complete run says so in its name and takes no rank. Trials of sweeps are on validation data and many: they are left to
the studies, and asked for by their tag.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from clplat.config.discovery import did_you_mean
from clplat.config.settings import TUNED
from clplat.errors import UserError
from clplat.report.compare import Group, higher_is_better, load_summaries, split_streams
from clplat.report.dashboard_figures import dashboard_figures
from clplat.report.dashboard_studies import SWEEP, studies_of
from clplat.report.data import Log, longest_experiences, read_log
from clplat.report.figures import MOST_PANELS, STEP_CURVES
from clplat.report.naming import short_name
from clplat.report.ranks import Ranking, rankings, ranks_in_rows
from clplat.report.spec import Figure
from clplat.report.tables import primary_metric
from clplat.run.rundir import runs_in

FACETS = ("stream", "strategy", "commit", "tag")
INCOMPLETE = " (incomplete)"
_HASH = 10  # characters of a commit that are shown

Run = dict[str, Any]


class Source(Protocol):
    """Where runs are read from, anew each time."""

    name: str

    def read(self) -> tuple[list[Run], list[str]]:
        """Summaries with config, tags, started (s), seconds and report; and what is to be said of runs left out."""

    def logs(self, runs: Sequence[Run], names: Sequence[str]) -> list[Log]:
        """What each run logged under these names."""

    def studies(self) -> list[dict[str, Any]]:
        """sweep.json of each study."""


@dataclass(frozen=True)
class Standing:
    """The groups of one stream, best first, and their ranks on its primary metric; None: without a complete run."""

    stream: str
    name: str
    metric: str
    groups: list[Group]
    ranks: list[float | None]
    figures: list[Figure] = field(default_factory=list)

    @property
    def ranked(self) -> int:
        """How many take a rank."""
        return sum(rank is not None for rank in self.ranks)


@dataclass(frozen=True)
class View:
    """All that a page shows.

    Args:
        total: runs in the source, before any was chosen.
        choices: facet → values that runs have.
        rows: of the leaderboard, best first: label, and for each stream the position of its group there, or None.
    """

    source: str
    runs: list[Run]
    total: int
    wanted: Mapping[str, Sequence[str]]
    choices: dict[str, list[str]]
    standings: list[Standing]
    rows: list[tuple[str, list[int | None]]]
    rankings: list[Ranking]
    studies: list[dict[str, Any]]
    notes: list[str] = field(default_factory=list)


@dataclass
class Folders:
    """Runs from their folders, and studies from sweep.json in these."""

    places: Sequence[Path]
    name: str = ""

    def __post_init__(self) -> None:
        self.name = ", ".join(map(str, self.places))

    def read(self) -> tuple[list[Run], list[str]]:
        """All runs in the folders, ended or not."""
        runs = load_summaries(runs_in(self.places, "dashboard", ended=False))
        return [{**run, **_facts(run)} for run in runs], []

    def logs(self, runs: Sequence[Run], names: Sequence[str]) -> list[Log]:
        """From metrics.jsonl, whole."""
        return [read_log(run) for run in runs]

    def studies(self) -> list[dict[str, Any]]:
        """From sweep.json."""
        return [json.loads(file.read_text()) for place in self.places for file in sorted(place.rglob("sweep.json"))]


def _facts(run: Run) -> Run:
    """What a run's folder knows beside its summary."""
    folder = Path(run["run_dir"])
    cost, report = run.get("cost") or {}, folder / "report.html"
    parts = [cost.get(k) for k in ("train_seconds", "eval_seconds", "save_seconds")]
    return {
        "tags": {k: str(v) for k, v in (((run["config"].get("tracking") or {}).get("tags")) or {}).items()},
        "run_id": str(folder), "run_name": "/".join(folder.parts[-2:]), "experiment": None,
        "started": (folder / "config.yaml").stat().st_mtime if (folder / "config.yaml").exists() else None,
        "seconds": sum(p or 0 for p in parts) if any(parts) else None, "report": report if report.is_file() else None,
    }  # fmt: skip


def view(source: Source, wanted: Mapping[str, Sequence[str]] | None = None) -> View:
    """What a source holds now, of the runs that are wanted.

    Args:
        wanted: facet → values, any of which will do; all facets must hold.

    Raises:
        UserError: there are no runs, or none that is wanted.
    """
    wanted = {facet: values for facet in FACETS if (values := list((wanted or {}).get(facet) or ()))}
    runs, notes = source.read()
    choices = {facet: _sorted({v for run in runs for v in facets(run)[facet]}) for facet in FACETS}
    kept = _chosen(runs, wanted, choices)
    asked = any(tag.startswith(f"{SWEEP}=") for tag in wanted.get("tag", ()))
    trials = [run for run in kept if SWEEP in run["tags"]]
    if trials and not asked:
        notes = [*notes, f"{len(trials)} runs are trials of sweeps, on validation data, and not ranked here: the tag "
                         f"{SWEEP} shows those of a study."]  # fmt: skip
        kept = [run for run in kept if SWEEP not in run["tags"]]
    standings = _drawn(source, standings_of(kept))
    whole = [[g for g, rank in zip(s.groups, s.ranks, strict=True) if rank is not None] for s in standings]
    known = source.studies() if not wanted or asked else []
    studies = known + [s for s in studies_of(trials) if s["study"] not in [k["study"] for k in known]]
    return View(source.name, kept, len(runs), wanted, choices, standings, leaderboard(standings),
                rankings([groups for groups in whole if groups]), studies, notes)  # fmt: skip


def facets(run: Run) -> dict[str, list[str]]:
    """What a run can be chosen by."""
    commit = run.get("git_commit")
    known = commit is not None and commit != "unknown"
    tags = [f"{k}={v}" for k, v in run["tags"].items() if k != TUNED and not k.startswith(f"{SWEEP}_")]
    return {
        "stream": [short_name(run.get("stream"))], "strategy": [short_name(run.get("strategy"))],
        "commit": [str(commit)[:_HASH]] if known else [], "tag": tags,
    }  # fmt: skip


def _chosen(runs: list[Run], wanted: Mapping[str, Sequence[str]], choices: Mapping[str, list[str]]) -> list[Run]:
    if not runs:
        raise UserError("dashboard: there are no runs of clplat's (valid: folders of runs, or a store that holds some)")
    faults = []
    for facet, values in wanted.items():
        for value in values:
            if not any(_is(facet, known, value) for known in choices[facet]):
                there = did_you_mean(value, choices[facet]) or f" (there are: {_listed(choices[facet])})"
                faults.append(f"dashboard: --{facet} {value}: no run has it{there}")
    if faults:
        raise UserError(*faults)
    kept = [run for run in runs if all(any(_is(facet, own, value) for own in facets(run)[facet] for value in values)
                                       for facet, values in wanted.items())]  # fmt: skip
    if not kept:
        said = " ".join(f"--{facet} {value}" for facet, values in wanted.items() for value in values)
        raise UserError(f"dashboard: no run has all of {said}")
    return kept


def _is(facet: str, own: str, value: str) -> bool:
    return own == value or (facet == "commit" and len(value) >= 4 and (own.startswith(value) or value.startswith(own)))


def _listed(values: Sequence[str], most: int = 12) -> str:
    more = f" and {len(values) - most} more" if len(values) > most else ""
    return (", ".join(values[:most]) + more) if values else "none"


def _sorted(values: Iterable[str]) -> list[str]:
    return sorted(values, key=str.lower)


def is_whole(group: Group) -> bool:
    """Whether its means are of complete runs."""
    return all(run.get("status") == "complete" for run in group.counted)


def standings_of(runs: Sequence[Run]) -> list[Standing]:
    """The groups of each stream, ranked; without figures."""
    return [_standing(groups) for groups in split_streams(runs)]


def _standing(groups: list[Group]) -> Standing:
    """Complete groups by their mean, then those that have none; then the incomplete ones."""
    metric = primary_metric(groups)
    better = higher_is_better(metric)
    whole = [g for g in groups if is_whole(g) and g.estimate(metric).mean is not None]
    means = np.array([[g.estimate(metric).mean for g in whole]], dtype=float)
    ranks = dict(zip(whole, ranks_in_rows(means if better is False else -means)[0].tolist(), strict=True))
    ordered = sorted(groups, key=lambda g: (g not in ranks, not is_whole(g), ranks.get(g, 0.0)))
    named = [g if is_whole(g) else replace(g, label=g.label + INCOMPLETE) for g in ordered]
    return Standing(groups[0].stream, short_name(groups[0].runs[0].get("stream")), metric, named,
                    [ranks.get(g) for g in ordered])  # fmt: skip


def leaderboard(standings: Sequence[Standing]) -> list[tuple[str, list[int | None]]]:
    """A row for each label that any stream has; best mean share of those it was ranked among first."""
    labels = dict.fromkeys(g.label for s in standings for g in s.groups)
    places = [{g.label: i for i, g in enumerate(s.groups)} for s in standings]
    rows = [(label, [place.get(label) for place in places]) for label in labels]

    def standing(row: tuple[str, list[int | None]]) -> tuple[bool, float]:
        shares = [rank / s.ranked for s, i in zip(standings, row[1], strict=True)
                  if i is not None and (rank := s.ranks[i]) is not None]  # fmt: skip
        return not shares, sum(shares) / max(1, len(shares))

    return sorted(rows, key=standing)


def _drawn(source: Source, standings: Sequence[Standing]) -> list[Standing]:
    """With their figures; the curves of all streams are asked for at once."""
    tests = [e.get("name") for s in standings for e in longest_experiences(s.groups)[:MOST_PANELS]]
    names = [n for n in STEP_CURVES if n != "train/gradient_norm"] + [
        f"anytime/{name}" for name in dict.fromkeys(tests)
    ]
    logs = iter(source.logs([run for s in standings for group in s.groups for run in group.counted], names))
    of_group = [{group: [next(logs) for _ in group.counted] for group in s.groups} for s in standings]
    return [replace(s, figures=dashboard_figures(s.groups, own)) for s, own in zip(standings, of_group, strict=True)]
