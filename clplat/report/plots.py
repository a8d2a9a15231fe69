"""Draws the same figures with matplotlib as PNG and PDF files, for papers and for trackers that show images."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

from clplat.report.compare import Estimate
from clplat.report.naming import cut_apart
from clplat.report.spec import Bars, Figure, Heat, Lines, Panel, Ranks, Scatter
from clplat.report.svg import bar_text, rank_rows, y_axis

# The page's colours of the light theme.
COLOURS = ("#0b62b8", "#c2501b", "#00795c", "#a4468f", "#8a6d00", "#1687a7", "#5b5bd6", "#5a6370")
_INK, _MUTED, _GRID, _HEAT = "#1b2330", "#566070", "#e4e8ee", "#0a4a9c"
_DASHES = ("-", "--", ":")
_MARKERS = "osD^v"


def draw(figure: Figure) -> dict[str, bytes]:
    """The figure as png, 150 dots per inch, and as pdf, its fonts in it; at most three panels a row."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    columns = min(3, len(figure.panels))
    rows = math.ceil(len(figure.panels) / columns)
    tall = [_height(p) for p in figure.panels]
    canvas = Canvas(figsize=(4.4 * columns, max(tall) * rows), dpi=150, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(rows, columns, squeeze=False).ravel()
    titles = cut_apart([p.title for p in figure.panels], 48)
    for axis, panel, title in zip(axes, figure.panels, titles, strict=False):
        _panel(axis, panel, title)
    for axis in axes[len(figure.panels) :]:
        axis.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    if len(labels) > 1 and not isinstance(figure.panels[0], Heat | Bars | Ranks):
        room = int(4.4 * columns / (0.07 * max(map(len, labels)) + 0.5))  # inches: a letter's, and a line's before it
        beside = max(1, min(4, len(labels), room))
        canvas.set_figheight(canvas.get_figheight() + 0.18 * (len(labels) // beside))
        canvas.legend(handles, labels, loc="outside lower center", ncols=beside, frameon=False, fontsize=8)
    png, pdf = io.BytesIO(), io.BytesIO()
    canvas.savefig(png, format="png")
    with mpl.rc_context({"pdf.fonttype": 42}):  # conferences refuse Type 3 fonts, matplotlib's own choice
        canvas.savefig(pdf, format="pdf", metadata={"CreationDate": None})
    return {"png": png.getvalue(), "pdf": pdf.getvalue()}


def _height(panel: Panel) -> float:
    if isinstance(panel, Heat):
        return max(2.0, min(8.0, 0.3 * len(panel.rows) + 1.0))
    if isinstance(panel, Ranks):
        return 0.9 + 0.12 * len(panel.alike) + 0.22 * math.ceil(len(panel.names) / 2)
    return max(1.6, 0.34 * len(panel.bars) + 0.9) if isinstance(panel, Bars) else 3.1


def _panel(axis: Any, panel: Panel, title: str) -> None:
    axis.set_title(_plain(title), fontsize=10, color=_INK, loc="left")
    axis.tick_params(labelsize=8, colors=_MUTED, length=3)
    axis.set_axisbelow(True)
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axis.spines[side].set_color(_GRID)
    if isinstance(panel, Lines):
        _lines(axis, panel)
    elif isinstance(panel, Scatter):
        _scatter(axis, panel)
    elif isinstance(panel, Heat):
        _heat(axis, panel)
    elif isinstance(panel, Ranks):
        _ranks(axis, panel)
    else:
        _bars(axis, panel)


def _plain(text: str) -> str:
    """A dollar sign would start a formula."""
    return text.replace("$", r"\$")


def _style(group: int) -> dict[str, Any]:
    return {"color": COLOURS[group % len(COLOURS)], "linestyle": _DASHES[group // len(COLOURS) % len(_DASHES)]}


def _label(axis: Any, x: str, y: str) -> None:
    axis.set_xlabel(x, fontsize=8, color=_MUTED)
    axis.set_ylabel(y, fontsize=8, color=_MUTED)
    axis.grid(color=_GRID, linewidth=0.7)


def _lines(axis: Any, panel: Lines) -> None:
    _label(axis, panel.x_label, panel.y_label)
    for mark in panel.marks:
        axis.axvline(mark, color=_MUTED, linewidth=0.6, linestyle=":")
    for level, label in panel.levels:
        axis.axhline(level, color=_MUTED, linewidth=0.6, linestyle=":")
        axis.annotate(_plain(label), (1, level), (-2, 2), ("axes fraction", "data"), textcoords="offset points",
                      ha="right", fontsize=7, color=_MUTED)  # fmt: skip
    for line in panel.series:
        marker = _MARKERS[line.group % len(_MARKERS)] if len(line.x) <= 30 else None
        axis.plot(line.x, line.y, label=_plain(line.label), linewidth=1.5, marker=marker, markersize=3.5,
                  **_style(line.group))  # fmt: skip
        band = [(x, lo, hi) for x, lo, hi in zip(line.x, line.low, line.high, strict=True) if lo is not None]
        if len(band) > 1:
            x, low, high = zip(*band, strict=True)
            axis.fill_between(x, low, high, color=_style(line.group)["color"], alpha=0.15, linewidth=0)
    for line in panel.series:
        for seed in line.seeds:
            axis.plot(*zip(*seed, strict=True), linewidth=0.8, alpha=0.6, color=_style(line.group)["color"])
    bounds = y_axis(panel)
    axis.set_ylim(bounds[0], bounds[-1])
    if panel.mark_label and panel.marks:
        axis.annotate(_plain(panel.mark_label), (panel.marks[0], 0), (3, 3), ("data", "axes fraction"),
                      textcoords="offset points", fontsize=7, color=_MUTED)  # fmt: skip
    if panel.whole:
        axis.xaxis.get_major_locator().set_params(integer=True)


def _error(value: Estimate) -> list[list[float]] | None:
    if value.mean is None or value.low is None or value.high is None:
        return None
    return [[value.mean - value.low], [value.high - value.mean]]


def _scatter(axis: Any, panel: Scatter) -> None:
    _label(axis, panel.x_label, panel.y_label)
    for p in panel.points:
        axis.errorbar(p.x.mean, p.y.mean, xerr=_error(p.x), yerr=_error(p.y), label=_plain(p.label), capsize=2,
                      fmt=_MARKERS[p.group % len(_MARKERS)], color=_style(p.group)["color"], markersize=6)  # fmt: skip
        for a, b in zip(p.x.seeds, p.y.seeds, strict=False):
            axis.plot(a, b, _MARKERS[p.group % len(_MARKERS)], color=_style(p.group)["color"], alpha=0.5, markersize=3)


def _heat(axis: Any, panel: Heat) -> None:
    from matplotlib.colors import LinearSegmentedColormap

    means = [[math.nan if c.mean is None else c.mean for c in row] for row in panel.values]
    axis.imshow(means, cmap=LinearSegmentedColormap.from_list("", ["#f7f9fc", _HEAT]), vmin=0, vmax=1, aspect="auto")
    axis.set_xticks(*_thinned(panel.columns), rotation=45, ha="right")
    axis.set_yticks(*_thinned(panel.rows))
    if len(panel.columns) <= 12:
        for i, row in enumerate(means):
            for j, value in enumerate(row):
                if not math.isnan(value):
                    axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7,
                              color="white" if value > 0.6 else _INK)  # fmt: skip


def _thinned(labels: Sequence[str]) -> tuple[list[int], list[str]]:
    kept = range(0, len(labels), math.ceil(len(labels) / 20))
    names = cut_apart([labels[i] for i in kept], 21)
    return list(kept), [_plain(name) for name in names]


def _bars(axis: Any, panel: Bars) -> None:
    for i, bar in enumerate(panel.bars):
        mean = bar.value.mean or 0.0
        axis.barh(i, mean, xerr=_error(bar.value), color=_style(bar.group)["color"], height=0.62, capsize=2,
                  error_kw={"linewidth": 1, "ecolor": _INK})  # fmt: skip
        if bar.value.seeds:
            axis.plot(bar.value.seeds, [i] * len(bar.value.seeds), "|", color=_INK, markersize=7)
        end = max(0.0, mean, bar.value.high or 0.0, *bar.value.seeds)
        axis.annotate(bar_text(bar, panel), (end, i), xytext=(4, 0), textcoords="offset points",
                      va="center", fontsize=7, color=_INK)  # fmt: skip
    axis.set_yticks(range(len(panel.bars)), [_plain(n) for n in cut_apart([b.label for b in panel.bars], 21)])
    axis.invert_yaxis()
    high = max(max(b.value.high or 0.0, b.value.mean or 0.0, *b.value.seeds) for b in panel.bars)
    low = min(b.value.mean or 0.0 for b in panel.bars)
    if low < 0:
        low = min(b.value.low if b.value.low is not None else low for b in panel.bars)
    axis.set_xlim(min(0.0, low), max(0.0, high) + 0.45 * (max(0.0, high) - min(0.0, low)) or 1)
    axis.set_xticks([])


def _ranks(axis: Any, panel: Ranks) -> None:
    """In rows of a name's height, downwards from the axis of ranks at 0."""
    count = len(panel.names)
    names = [_plain(n) for n in cut_apart([f"{n} {m:.2f}" for n, m in zip(panel.names, panel.means, strict=True)], 26)]
    top = 0.6 + 0.5 * len(panel.alike)
    ends = (1 - 0.04 * count, count + 0.04 * count)
    axis.set_axis_off()
    axis.plot((1, count), (0, 0), color=_MUTED, linewidth=0.8)
    for tick in range(1, count + 1, math.ceil(count / 12)):
        axis.plot((tick, tick), (0, -0.25), color=_MUTED, linewidth=0.8)
        axis.text(tick, -0.4, str(tick), ha="center", va="bottom", fontsize=8, color=_MUTED)
    if panel.length is not None:
        end = 1 + min(panel.length, count - 1)
        axis.errorbar((1 + end) / 2, -1.8, xerr=(end - 1) / 2, fmt="none", color=_INK, linewidth=1, capsize=3)
        axis.text(end, -1.8, f"  CD {panel.length:.2f}", va="center", fontsize=8, color=_INK)
    for name, mean, (left, row) in zip(names, panel.means, rank_rows(count), strict=True):
        y, side = top + 0.6 + row, ends[0] if left else ends[1]
        axis.plot((mean, mean, side), (0, y, y), color=_MUTED, linewidth=0.8)
        axis.text(side, y, f"{name} " if left else f" {name}", ha="right" if left else "left", va="center",
                  fontsize=8, color=_INK)  # fmt: skip
    for row, (first, last) in enumerate(panel.alike):
        y = 0.5 + 0.5 * row
        axis.plot((panel.means[first], panel.means[last]), (y, y), color=_INK, linewidth=3, solid_capstyle="round")
    axis.set_ylim(top + math.ceil(count / 2) + 0.4, -1.2 if panel.length is None else -2.4)
