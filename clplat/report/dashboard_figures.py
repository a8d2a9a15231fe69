"""Figures of a dashboard: those of a report that tell strategies apart at a glance, and the fronts of studies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from clplat.report.compare import Estimate, Group, metric_info
from clplat.report.data import Log
from clplat.report.figures import build_figures
from clplat.report.numbers import show, show_estimate, unit_of
from clplat.report.spec import Bar, Bars, Figure, Panel, Point, Scatter
from clplat.report.tables import title_of

MATRICES = 12  # drawn of a stream, its best groups'
_BARS = (
    ("stability-gap", "Stability gap", ("stability_gap", "minimum_accuracy", "worst_case_accuracy",
                                        "average_anytime_accuracy")),
    ("erasure", "Erasure", ("forget_accuracy", "retain_accuracy", "h_mean", "relapse")),
    ("adaptation", "Adaptation", ("online_error", "last_round_error", "round_drift", "source_drop")),
    ("general-ability", "General ability", ("general_accuracy", "general_drop", "general_perplexity",
                                            "general_perplexity_ratio")),
    ("perplexity", "Perplexity", ("zero_shot_perplexity", "continual_perplexity", "last_perplexity",
                                  "perplexity_forgetting")),
    ("interaction", "Interaction", ("normalized_return", "initial_dip", "recovery_fraction")),
)  # fmt: skip
_PLACES = {0: "on the front", 1: "dominated", 2: "default"}


def dashboard_figures(groups: list[Group], logs: dict[Group, list[Log]]) -> list[Figure]:
    """Of the groups of one stream, best first."""
    found = [_fewer(figure) for figure in build_figures(groups, logs, brief=True)]
    bars = [_bars(groups, *what) for what in _BARS]
    return [*found, *(figure for figure in bars if figure is not None)]


def _fewer(figure: Figure) -> Figure:
    """Matrices of the best groups alone, where there are many."""
    if figure.slug != "accuracy-matrix" or len(figure.panels) <= MATRICES:
        return figure
    note = f" The best {MATRICES} of {len(figure.panels)} are drawn; each run's report has its own."
    return replace(figure, panels=figure.panels[:MATRICES], caption=figure.caption + note)


def _bars(groups: list[Group], slug: str, title: str, names: Sequence[str]) -> Figure | None:
    """A panel for each of these metrics that has been measured."""
    panels: list[Panel] = []
    meaning, said = [], []
    for name in names:
        values = [(i, g, g.estimate(name)) for i, g in enumerate(groups)]
        bars = [Bar(i, g.label, value) for i, g, value in values if value.mean is not None]
        info = metric_info(name)
        if bars and info is not None:
            panels.append(Bars(title_of(name).capitalize(), bars, unit_of(name)))
            meaning.append(f"{name.replace('_', ' ').capitalize()}: {info.summary}")
            said.append(f"{title_of(name)}: " + ", ".join(f"{b.label} {show_estimate(b.value)}" for b in bars))
    caption = "; ".join(meaning) + ". Mean over seeds, with its 95 % interval; of two seeds, a stroke each."
    return Figure(slug, title, caption, f"Bar charts. {'; '.join(said)}.", panels) if panels else None


def front_figure(study: Mapping[str, Any]) -> Figure | None:
    """The trials of a study of two metrics, with those that no other is better than in both; None for one metric."""
    metrics = study.get("metrics") or []
    front = {point["number"] for point in study.get("front") or []}
    trials = [t for t in study.get("trials") or [] if len(t.get("values") or []) == 2]
    if len(metrics) != 2 or not trials:
        return None
    units = [unit_of(m) for m in metrics]

    def point(trial: Mapping[str, Any]) -> Point:
        params = trial.get("label") or ", ".join(
            f"{k.rpartition('.')[2]} {_short(v)}" for k, v in trial["params"].items()
        )
        place = 2 if trial.get("default") else 0 if trial["number"] in front else 1
        also = ", on the front" if place == 2 and trial["number"] in front else ""
        what = f"trial {trial['number']}{' (default' + also + ')' if place == 2 else ''}: {params}"
        return Point(place, what, *(Estimate(1, v) for v in trial["values"]))

    points = sorted(map(point, trials), key=lambda p: -p.group)
    ends = sorted(tuple(t["values"]) for t in trials if t["number"] in front)
    x, y = map(title_of, metrics)
    title = f"Study {study.get('study')}"
    said = "; ".join(f"{show(a, units[0])}, {show(b, units[1])}" for a, b in ends)
    caption = (
        f"Each mark a trial, on validation data; joined: the {len(front)} that no other is better than in both. "
        f"{str(study.get('protocol') or 'protocol not known').capitalize()}. Spent: {study.get('effort')}."
    )
    panel = Scatter(title, x, y, points, units[0], units[1], ends)
    return Figure(f"front-{study.get('study')}", title, caption, f"Scatter plot. The front: {said}.", [panel])


def places(figure: Figure) -> dict[int, str]:
    """What the marks of a front's figure stand for."""
    found = {p.group for panel in figure.panels if isinstance(panel, Scatter) for p in panel.points}
    return {group: _PLACES[group] for group in sorted(found)}


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
