"""The figures of a report: what is drawn for the groups of one stream."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from clplat.report import adaptation, general, interaction
from clplat.report.compare import Group
from clplat.report.data import (
    Log,
    average_curve,
    list_curve,
    longest_experiences,
    mean_matrix,
    scored,
    series,
    step_curve,
    titles,
)
from clplat.report.naming import cut_apart
from clplat.report.numbers import show, show_estimate, unit_of
from clplat.report.spec import Bar, Bars, Figure, Heat, Lines, Panel, Point, Scatter, Series

_LONGEST = 40  # characters of a test set's title over a chart; the matrix and the table of experiences have all
_BANDS = "Bands: 95 % interval over seeds; of two, thin lines, one a seed."
MOST_PANELS = 12
MOST_CELLS = 60  # of a matrix in a row or column: more can't be told apart on a screen
_TRADE_OFFS = (
    ("stability", "plasticity", "Plasticity against stability", "Up and to the right is better."),
    ("retain_accuracy", "forget_accuracy", "Erasure against retention", "Down and to the right is better."),
)  # fmt: skip
_REPRESENTATION = {
    "dormant_fraction": "Dormant units (fraction)",
    "effective_rank": "Effective rank",
    "weight_norm": "Weight norm",
    "gradient_norm": "Gradient norm",
    "intruder_dimensions": "Intruder dimensions since the start",
    "new_intruder_dimensions": "Intruder dimensions of each experience",
    "tuning_contribution": "Tuning contribution (TuCo)",
}
_COSTS = {
    "train_seconds": "Training time",
    "samples_per_second": "Training throughput (samples)",
    "peak_rss_bytes": "Peak memory",
    "peak_device_bytes": "Peak device memory",
    "stored_bytes": "Stored by the strategy",
    "trainable_parameters": "Trainable parameters",
}
STEP_CURVES = (
    "anytime/accuracy",
    "train/loss",
    "adapt/online_error",
    "adapt/running_error",
    "interact/return",
    "train/gradient_norm",
)


def build_figures(groups: list[Group], logs: dict[Group, list[Log]], *, brief: bool = False) -> list[Figure]:
    """All figures that the groups of one stream have data for, in reading order.

    Args:
        brief: without those that look into each experience and into the network.
    """
    experiences = longest_experiences(groups)
    candidates = [
        _matrices(groups, titles(groups)),
        _averages(groups, logs),
        *(_trade_off(groups, *names) for names in _TRADE_OFFS),
        None if brief else _per_experience(groups, experiences),
        *adaptation.figures(groups),
        *interaction.figures(groups),
        general.figure(groups),
        _over_steps(groups, logs),
        _anytime_per_experience(groups, experiences, logs),
        None if brief else _representation(groups),
        _costs(groups),
    ]
    return [figure for figure in candidates if figure is not None and figure.panels]


def _name(names: Sequence[str], j: int) -> str:
    return names[j] if j < len(names) else str(j + 1)


def _spread(items: Sequence[int], most: int) -> list[int]:
    """At most so many of the items, evenly spaced, the first and the last among them."""
    count = len(items)
    return list(items) if count <= most else [items[round(k * (count - 1) / (most - 1))] for k in range(most)]


def _matrices(groups: list[Group], names: Sequence[str]) -> Figure | None:
    panels: list[Panel] = []
    shown = _spread(range(len(names)), MOST_CELLS)
    for index, group in enumerate(groups):
        # One test set among many experiences (adapting: the clean one) is a line, which has a chart of its own.
        if len(scored(group)) < min(2, len(names)):
            continue
        matrix = mean_matrix(group, [0, *(j + 1 for j in shown)], shown)
        columns = [_name(names, j) for j in shown[: len(matrix[0])]]
        rows = ["before", *(_name(names, j) for j in shown[: len(matrix) - 1])]
        panels.append(Heat(group.label, index, rows, columns, matrix))
    caption = (
        "Row: after which experience. Column: which test set. Mean over seeds; a blank cell was not measured. "
        "The line under a cell marks the experience just trained; to its right lie those still to come."
    )
    if len(shown) < len(names):
        caption += f" {len(shown)} of {len(names)} experiences are drawn, evenly spaced; summary.json has all."
    alt = "Heat maps of the accuracy matrix, one for each strategy: " + ", ".join(p.title for p in panels) + "."
    return Figure("accuracy-matrix", "Accuracy matrix", caption, alt, panels)


def _kept(candidates: Sequence[Series | None]) -> list[Series]:
    return [s for s in candidates if s is not None]


def _ends(lines: Sequence[Series], unit: str = "fraction") -> str:
    """In words: where each line ends."""
    return "; ".join(f"{s.label} ends at {show(s.y[-1], unit)}" for s in lines) + "."


def _averages(groups: list[Group], logs: dict[Group, list[Log]]) -> Figure | None:
    lines = _kept([average_curve(i, g, logs[g]) for i, g in enumerate(groups)])
    if not lines:
        return None
    title = "Average accuracy over experiences"
    panel = Lines(title, "experiences finished", "average accuracy", lines)
    caption = f"Mean accuracy over the experiences met so far. {_BANDS}"
    return Figure("average-accuracy", title, caption,
                  "Average accuracy after each experience: " + _ends(lines), [panel])  # fmt: skip


def _per_experience(groups: list[Group], experiences: list[dict[str, Any]]) -> Figure | None:
    known = sorted({j for g in groups for j in scored(g)})
    shown = _spread(known, MOST_PANELS)
    matrices = [mean_matrix(g, columns=shown) for g in groups]
    panels: list[Panel] = []
    names = cut_apart(titles(groups), _LONGEST)
    for place, j in enumerate(shown):
        columns = [[row[place] for row in m] if m and place < len(m[0]) else [] for m in matrices]
        lines = _kept([
            series(i, g.label, [float(r) for r in range(len(c))], c)
            for i, (g, c) in enumerate(zip(groups, columns, strict=True))
        ])  # fmt: skip
        if lines:
            # What is adapted to has no test set: the one that it may carry is of the data of the source.
            adapted = j < len(experiences) and experiences[j].get("kind") == "adapt"
            name, marks = ("source data", []) if adapted else (_name(names, j), [j + 1])
            panels.append(Lines(name, "experiences finished", "", lines, y_range=(0, 1), marks=marks))
    caption = "Accuracy on each test set as the run goes on. The thin line marks the end of its own experience."
    if len(shown) < len(known):
        caption += f" {MOST_PANELS} of {len(known)} test sets are drawn, evenly spaced; summary.json has all."
    alt = f"Small charts of accuracy over time for {len(panels)} test sets."
    return Figure("accuracy-per-experience", "Accuracy on each experience", caption, alt, panels)


def _step_curves(groups: list[Group], logs: dict[Group, list[Log]], name: str) -> list[Series]:
    lines = _kept([step_curve(i, g, name, logs[g]) for i, g in enumerate(groups)])
    return lines if any(len(line.x) > 1 for line in lines) else []


def _shared_ends(groups: list[Group], logs: dict[Group, list[Log]]) -> Sequence[float]:
    """Optimisation steps at which experiences end, where they are the same for all runs and not too many to draw."""
    ends = {tuple(log.ends) for g in groups for log in logs[g]}
    shared = ends.pop() if len(ends) == 1 else ()
    return shared if len(shared) <= 40 else ()


def _anytime_per_experience(groups: list[Group], experiences: list[dict[str, Any]], logs: dict[Group, list[Log]]
                            ) -> Figure | None:  # fmt: skip
    panels: list[Panel] = []
    for experience, title in zip(experiences[:MOST_PANELS], cut_apart(titles(groups), _LONGEST), strict=False):
        lines = _step_curves(groups, logs, f"anytime/{experience.get('name')}")
        if lines:
            panels.append(Lines(title, "optimisation steps", "", lines, y_range=(0, 1),
                                whole=False, marks=_shared_ends(groups, logs)))  # fmt: skip
    caption = "Accuracy on each test set while training goes on: a dip that comes back is the stability gap."
    if len(experiences) > MOST_PANELS:
        caption += f" The first {MOST_PANELS} of {len(experiences)} test sets."
    alt = f"Small charts of accuracy over optimisation steps for {len(panels)} test sets."
    return Figure("anytime-per-experience", "Accuracy on each experience, step by step", caption, alt, panels)


def _over_steps(groups: list[Group], logs: dict[Group, list[Log]]) -> Figure | None:
    drawn = any(run.get("interaction") for g in groups for run in g.counted)  # over steps in the environment
    names = [n for n in STEP_CURVES if n != "interact/return" or not drawn]
    curves = {name: _step_curves(groups, logs, name) for name in names}
    panels: list[Panel] = []
    for name, lines in curves.items():
        if lines:
            title = name.replace("_", " ").replace("/", " ").capitalize()
            unit = "fraction" if "accuracy" in name or "error" in name else "number"
            panels.append(Lines(title, "optimisation steps", "", lines, unit, None, False, _shared_ends(groups, logs)))
    marks = " Upright lines: ends of experiences." if _shared_ends(groups, logs) else ""
    caption = f"Within experiences, step by step. {_BANDS}{marks}"
    alt = "Curves over optimisation steps: " + ", ".join(p.title for p in panels) + "."
    return Figure("over-steps", "Curves over optimisation steps", caption, alt, panels)


def _trade_off(groups: list[Group], x: str, y: str, title: str, reading: str) -> Figure | None:
    points = [Point(i, g.label, g.estimate(x), g.estimate(y)) for i, g in enumerate(groups)]
    points = [p for p in points if p.x.mean is not None and p.y.mean is not None]
    if len(points) < 2:
        return None
    x_label, y_label = x.replace("_", " "), y.replace("_", " ")
    caption = f"{reading} Bars: 95 % interval over seeds, each way; of two seeds, a small mark each."
    alt = "; ".join(f"{p.label}: {x_label} {show_estimate(p.x)}, {y_label} {show_estimate(p.y)}" for p in points)
    panel = Scatter(title, x_label, y_label, points)
    return Figure(f"{y}-{x}".replace("_", "-"), title, caption, f"Scatter plot. {alt}.", [panel])


def _representation(groups: list[Group]) -> Figure | None:
    panels: list[Panel] = []
    for name, title in _REPRESENTATION.items():
        lines = _kept([list_curve(i, g, name) for i, g in enumerate(groups)])
        if lines:
            unit = "fraction" if name in ("dormant_fraction", "tuning_contribution") else "number"
            panels.append(Lines(title, "experiences finished", "", lines, unit))
    caption = (
        "Whether the network stays able to learn: growing dormancy, falling effective rank or growing weights are "
        "signs of lost plasticity."
    )
    alt = "Charts over experiences: " + ", ".join(p.title for p in panels) + "."
    return Figure("representation", "Health of the representation", caption, alt, panels)


def _costs(groups: list[Group]) -> Figure | None:
    panels: list[Panel] = []
    for name, title in _COSTS.items():
        means = [(i, g, g.estimate(name)) for i, g in enumerate(groups)]
        bars = [Bar(i, g.label, value) for i, g, value in means if value.mean is not None]
        if len(bars) > 1:
            panels.append(Bars(title, bars, unit_of(name)))
    alt = "; ".join(
        f"{p.title}: " + ", ".join(f"{b.label} {show_estimate(b.value, p.unit)}" for b in p.bars)
        for p in panels
        if isinstance(p, Bars)
    )
    return Figure(
        "cost",
        "Cost",
        "Mean over seeds, with its 95 % interval; of two seeds, a stroke each.",
        f"Bar charts. {alt}.",
        panels,
    )
