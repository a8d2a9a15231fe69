"""Figure of sets that no experience learns: accuracy and perplexity as the run goes on."""

from __future__ import annotations

from typing import Any

from clplat.report.compare import Bounds, Group, estimate
from clplat.report.data import FRACTION, series
from clplat.report.spec import Figure, Lines, Panel

_PERPLEXITY: Bounds = (1, None)


def figure(groups: list[Group]) -> Figure | None:
    """A panel for each set; None where no run has measured one."""
    panels: list[Panel] = []
    for what in ("accuracy", "perplexity"):
        tables = [[(run.get("general") or {}).get(what) or {} for run in group.counted] for group in groups]
        for name in dict.fromkeys(name for own in tables for table in own for name in table):
            panels.append(_panel(groups, [[t.get(name) or [] for t in own] for own in tables], what, name))
    caption = (
        "Sets of which nothing is learned, before the first experience and after each: what a model knew and loses, or "
        "gains. Perplexity: lower is better. Bands: 95 % interval over seeds; of two, thin lines, one a seed."
    )
    alt = "Charts over experiences: " + ", ".join(p.title for p in panels) + "."
    return Figure("general-ability", "General ability", caption, alt, panels) if panels else None


def _panel(groups: list[Group], values: list[list[list[Any]]], what: str, name: str) -> Lines:
    """Args: values: of each group, of each of its runs, one number a row."""
    bounds, lines = FRACTION if what == "accuracy" else _PERPLEXITY, []
    for index, (group, runs) in enumerate(zip(groups, values, strict=True)):
        length = max(map(len, runs), default=0)
        rows = [estimate([run[i] if i < len(run) else None for run in runs], bounds) for i in range(length)]
        line = series(index, group.label, [float(i) for i in range(length)], rows)
        lines += [line] if line is not None else []
    title = f"{what.capitalize()}, {name}"
    if what == "accuracy":
        return Lines(title, "experiences finished", "", lines, y_range=(0, 1))
    return Lines(title, "experiences finished", "", lines, "number")
