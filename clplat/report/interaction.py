"""Figures and the dip table of interact experiences: returns since the hand-over, the probe, scores over seeds.

Scores are last returns, normalised where the stream knows a random and an expert policy's. Definitions of the figures
over several runs: `clplat.metrics.aggregate`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np

from clplat.metrics import aggregate
from clplat.report.compare import FEWEST, Estimate, Group, estimate
from clplat.report.data import seeds_curve
from clplat.report.numbers import NONE, show, show_estimate
from clplat.report.parts import table
from clplat.report.spec import Bar, Bars, Figure, Heat, Lines, Panel, Series

_MOST = 12  # panels of a figure, groups of a matrix
_THRESHOLDS = 101
_STEPS = "steps in the environment"
_PROBE = {"td_error": "TD error", "q": "Value and return", "return_error": "Distance of value from return"}

Entry = dict[str, Any]
Points = Callable[[Entry], list[list[float]]]  # (x, y) of an entry


def figures(groups: list[Group]) -> list[Figure | None]:
    """What there is to draw of the groups of one stream; None where they have no data for a figure."""
    if not _names(groups):
        return []
    return [_returns(groups), _probe(groups), _over_runs(groups)]


def _entries(run: dict[str, Any]) -> list[Entry]:
    return run.get("interaction") or []


def _names(groups: Sequence[Group]) -> list[str]:
    """Experiences that have ended, by the run with most of them."""
    return max(([e["experience"] for e in _entries(r)] for g in groups for r in g.counted), key=len, default=[])


def _at(group: Group, j: int) -> list[Entry]:
    """Experience j of each counted run that has ended it."""
    return [entries[j] for run in group.counted if j < len(entries := _entries(run))]


def _normalised(groups: Sequence[Group]) -> bool:
    return all(e["return_bounds"] for g in groups for run in g.counted for e in _entries(run))


def _scale(entry: Entry, normalised: bool) -> Callable[[float], float]:
    low, high = entry["return_bounds"] if normalised else (0.0, 1.0)
    return lambda value: (value - low) / (high - low)


def _panels(
    groups: list[Group], points: Callable[[Entry], list[list[float]]], title: str, **shared: Any
) -> list[Lines]:
    """A panel for each experience, a line for each group that has `points` there."""
    names, panels = _names(groups), []
    for j, name in enumerate(names[:_MOST]):
        drawn = [seeds_curve(i, g.label, [points(e) for e in _at(g, j)]) for i, g in enumerate(groups)]
        lines = [line for line in drawn if line is not None]
        if lines:
            of = (name if not title else f"{title}, {name}") if len(names) > 1 else title
            panels.append(Lines(of, _STEPS, "", lines, "number", whole=False, **shared))
    return panels


def _returns(groups: list[Group]) -> Figure | None:
    normalised = _normalised(groups)

    def points(entry: Entry) -> list[list[float]]:
        scale, start = _scale(entry, normalised), entry["before"]
        return [*([] if start is None else [[0, scale(start)]]), *([t, scale(g)] for t, g in entry["evaluations"])]

    panels = _panels(groups, points, "", marks=[0.0], mark_label="hand-over")
    title = "Normalised return" if normalised else "Return"
    kind = "Mean return between a random policy's (0) and an expert's (1)" if normalised else "Mean return, as it is,"
    caption = (
        f"{kind} of evaluation episodes since the hand-over to the environment, where the line begins with what came "
        "from before. Bands: 95 % interval over seeds; of two, thin lines, one a seed."
    )
    ends = "; ".join(f"{s.label} ends at {show(s.y[-1], 'number')}" for p in panels for s in p.series)
    return Figure("returns", f"{title} since the hand-over", caption, f"{title} over {_STEPS}: {ends}.", panels)


def _probe(groups: list[Group]) -> Figure | None:
    panels: list[Panel] = []
    for name, title in _PROBE.items():
        known = [p["mc_return"] for g in groups for run in g.counted for e in _entries(run) for p in e["probe"]
                 if "mc_return" in p] if name == "q" else []  # fmt: skip
        ends = sorted({round(v, 6) for v in (min(known), max(known))}) if known else []
        levels = [(v, "return" if len(ends) == 1 else label) for v, label in
                  zip(ends, ("lowest return", "highest return"), strict=False)]  # fmt: skip

        def points(entry: Entry, name: str = name) -> list[list[float]]:
            return [[p["env_step"], p[name]] for p in entry["probe"] if name in p]

        panels += _panels(groups, points, title, levels=levels)
    caption = (
        "On recorded transitions kept for measurement, from which nothing learns, in the agent's units: size of the TD "
        "error; mean value of the recorded actions, with the mean discounted return that their episodes had from there "
        "(over seeds, from lowest to highest); mean distance of the two. Values that fall far below the return: what "
        "was learned before is being lost."
    )
    alt = "Curves over steps in the environment: " + ", ".join(p.title for p in panels) + "."
    return Figure("probe", "Values on recorded transitions", caption, alt, panels)


def scores(group: Group, normalised: bool, experiences: int) -> np.ndarray:
    """Last returns (R, T) of the counted runs that have ended all T experiences."""
    rows = [
        [_scale(e, normalised)(e["evaluations"][-1][1]) for e in entries]
        for run in group.counted
        if len(entries := _entries(run)) == experiences and all(e["evaluations"] for e in entries)
    ]
    return np.array(rows, dtype=float).reshape(-1, experiences)


def _over_runs(groups: list[Group]) -> Figure | None:
    """Interquartile mean, probability of improvement and performance profile; from two seeds of a group on."""
    normalised, tasks = _normalised(groups), len(_names(groups))
    found = {i: scores(g, normalised, tasks) for i, g in enumerate(groups)}
    found = {i: s for i, s in found.items() if len(s)}
    if max(map(len, found.values()), default=0) < 2 or (tasks > 1 and not normalised):
        return None  # raw returns of different environments do not add up
    label = "normalised return" if normalised else "return"
    means = {i: _interval(len(s), aggregate.interquartile_mean, s) for i, s in found.items()}
    bars = [Bar(i, groups[i].label, value) for i, value in means.items()]
    panels: list[Panel] = [
        _profile(groups, found, label),
        Bars(f"Interquartile mean of the {label}", bars, "number", True),
    ]
    if 1 < len(found) <= _MOST:
        panels.append(_improvement(groups, found))
    caption = (
        f"Last {label} of each run (and environment), as rliable defines them: the share of runs above a score; the "
        "mean of the middle half; the probability that a run of the row is better than one of the column, ties as "
        "half. 95 % intervals by stratified bootstrap over seeds, 2,000 draws; with few seeds they are too narrow."
    )
    said = "; ".join(f"{groups[i].label} {show(v.mean, 'number')} of {v.n} runs" for i, v in means.items())
    return Figure("scores-over-runs", "Scores over runs", caption, f"Interquartile means: {said}.", panels)


def _interval(runs: int, statistic: Callable[..., float], *given: np.ndarray) -> Estimate:
    """The statistic with its bootstrap interval, where there are runs to draw from."""
    low, high = aggregate.stratified_bootstrap(statistic, *given) if runs >= FEWEST else (None, None)
    return Estimate(runs, statistic(*given), None, low, high)


def _profile(groups: list[Group], found: dict[int, np.ndarray], label: str) -> Lines:
    least, most = min(s.min() for s in found.values()), max(s.max() for s in found.values())
    margin = 0.05 * (most - least) or 1.0
    grid = np.linspace(least - margin, most + margin, _THRESHOLDS)
    lines = []
    for i, s in found.items():
        share, bands = aggregate.performance_profile(s, grid), [[None] * len(grid)] * 2
        if len(s) >= FEWEST:
            bands = [end.tolist() for end in aggregate.profile_interval(s, grid)]
        lines.append(Series(i, groups[i].label, grid.tolist(), share.tolist(), bands[0], bands[1]))
    return Lines("Performance profile", f"{label} τ", "share of runs above τ", lines, y_range=(0, 1), whole=False)


def _improvement(groups: list[Group], found: dict[int, np.ndarray]) -> Heat:
    names, rows = [f"{k} {groups[i].label}" for k, i in enumerate(found, 1)], []
    for i, x in found.items():
        fewest = {j: min(len(x), len(y)) for j, y in found.items()}
        rows.append([Estimate(0) if i == j else _interval(fewest[j], aggregate.probability_of_improvement, x, y)
                     for j, y in found.items()])  # fmt: skip
    columns = [str(k) for k in range(1, len(names) + 1)]  # labels often begin alike, and are cut
    return Heat("Probability of improvement", None, names, columns, rows, accuracy=False)


def frames(groups: Sequence[Group]) -> str:
    """Strips of evaluation episodes, of the first counted run of each group that has kept some (`loop.eval_frames`)."""
    cards = []
    for group in groups:
        run = next((r for r in group.counted if _strips(r)), None)
        if run is None:
            continue
        names = [escape(str(e.get("name"))) for e in run.get("experiences") or []]
        rows = []
        for file in _strips(run):
            index, _, when = file.stem.partition("-")
            name = names[int(index)] if index.isdigit() and int(index) < len(names) else index
            told = f"{name}, {'at the hand-over' if when == 'before' else 'at the end'}"
            content = base64.b64encode(file.read_bytes()).decode()
            picture = f'<img alt="Frames of an episode of {told}" src="data:image/png;base64,{content}">'
            frame = f'<div class="scroll" tabindex="0" role="region" aria-label="{told}">{picture}</div>'
            rows.append(f'<p class="under">{told}</p>{frame}')
        cards.append(f"<h4>{escape(group.label)}, seed {escape(str(run.get('seed')))}</h4>{''.join(rows)}")
    if not cards:
        return ""
    return f'<section class="card"><h3>Evaluation episodes, from left to right</h3>{"".join(cards)}</section>'


def _strips(run: dict[str, Any]) -> list[Path]:
    """Files of a run by experience, those of the hand-over first."""
    folder = Path(run["run_dir"]) / "frames" if run.get("run_dir") else None
    found = sorted(folder.glob("*-*.png")) if folder is not None else []
    return sorted(found, key=lambda f: (int(i) if (i := f.stem.partition("-")[0]).isdigit() else -1, "after" in f.stem))


def dip_table(groups: Sequence[Group]) -> str:
    """What was lost after the hand-over, for each group and experience: depth, length, area."""
    normalised, names = _normalised(groups), _names(groups)
    head = ["Strategy", *(["Experience"] if len(names) > 1 else []), "on entry", "lowest", "last", "depth", "area",
            "steps until back"]  # fmt: skip
    rows = []
    for group in groups:
        for j, name in enumerate(names):
            kept = [e for e in _at(group, j) if e["dip"] is not None]
            if kept:
                where = [escape(name)] if len(names) > 1 else []
                rows.append([escape(group.label), *where, *_dip_cells(kept, normalised)])
    if not rows:
        return ""
    unit = "normalised returns" if normalised else "returns"
    caption = f"Mean ± half the 95 % interval over seeds, in {unit}; depth: in the first half; area: mean loss over all"
    body = table(caption, head, rows, words=1 + (len(names) > 1))
    return f'<section class="card"><h3>The dip after the hand-over</h3>{body}</section>'


def _dip_cells(entries: list[Entry], normalised: bool) -> list[str]:
    def shown(values: Sequence[float | None], unit: str = "fraction" if normalised else "number") -> str:
        return escape(show_estimate(estimate(values), unit))

    measured = [(_scale(e, normalised), e) for e in entries]
    on_entry = [scale(e["before"]) for scale, e in measured]
    lowest = [scale(min(g for _, g in e["evaluations"])) for scale, e in measured]
    last = [scale(e["evaluations"][-1][1]) for scale, e in measured]
    wide = [1.0 if bool(e["return_bounds"]) == normalised else e["return_bounds"][1] - e["return_bounds"][0]
            for e in entries]  # fmt: skip
    depth, area = ([w * e["dip"][k] for w, e in zip(wide, entries, strict=True)] for k in ("depth", "area"))
    back = [e["dip"]["steps"] for e in entries if e["dip"]["steps"] is not None]
    length = shown(back, "number") if back else NONE
    if len(back) < len(entries):
        length += f" ({len(entries) - len(back)} of {len(entries)} not back)"
    return [shown(on_entry), shown(lowest), shown(last), shown(depth), shown(area), length]
