"""Draws a panel as inline SVG: no script, no style attribute, no id; colours come from the page's classes.

Every shape that stands for a number has a <title>, which browsers show on hover; the page's script shows it at once
and on touch. Lengths are in units of the view box, about a pixel each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

from clplat.report.compare import Estimate
from clplat.report.naming import cut_apart
from clplat.report.numbers import show, show_estimate, tick_labels, ticks
from clplat.report.spec import Bar, Bars, Heat, Lines, Panel, Ranks, Scatter

WIDE, NARROW = 530, 345  # of a panel: two beside each other, or three and more
RIGHT, TOP, BOTTOM = 14, 12, 46
PALETTE = 8
_MOST_HITS = 60
_CHARACTER = 6.6  # mean width of a character at 12 units

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Frame:
    """Where the data of a panel are drawn, and how they are scaled."""

    left: float
    right: float
    bottom: float
    x: Scale
    y: Scale
    x_ticks: Sequence[float]
    y_ticks: Sequence[float]

    def inside(self, value: float) -> float:
        """y of a value, cut at the frame."""
        return self.y(min(max(value, self.y_ticks[0]), self.y_ticks[-1]))


def render(panel: Panel, alt: str, width: float = WIDE) -> str:
    """The panel as one <svg> element `width` wide, described by `alt`."""
    height = round(0.36 * width + 105)
    if isinstance(panel, Lines):
        return _svg(width, height, alt, _lines(panel, width, height))
    if isinstance(panel, Scatter):
        return _svg(width, height, alt, _scatter(panel, width, height))
    if isinstance(panel, Heat):
        body, tall = _heat(panel, width)
        return _svg(width, tall, alt, body)
    if isinstance(panel, Ranks):
        body, tall = _ranks(panel, width)
        return _svg(width, tall, alt, body)
    return _svg(width, 30 * len(panel.bars) + 12, alt, _bars(panel, width))


def marker(shape: int, x: float, y: float, size: float = 4.0) -> str:
    """A marker of group `shape`: colour is never the only difference between two lines."""
    s = size
    corners = {
        1: [(-s, -s), (s, -s), (s, s), (-s, s)],
        2: [(0, -1.2 * s), (1.2 * s, s), (-1.2 * s, s)],
        3: [(0, -1.4 * s), (1.4 * s, 0), (0, 1.4 * s), (-1.4 * s, 0)],
        4: [(0, 1.2 * s), (1.2 * s, -s), (-1.2 * s, -s)],
    }.get(shape % 5)
    if corners is None:
        return f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="{1.1 * s:.1f}"/>'
    return f'<polygon class="dot" points="{_points([(x + a, y + b) for a, b in corners])}"/>'


def group_class(index: int) -> str:
    """Classes of a group: its colour and, from the ninth on, a dash."""
    return f"g{index % PALETTE} d{index // PALETTE % 3}"


def _svg(width: float, height: float, alt: str, body: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width:.0f} {height:.0f}" role="img" aria-label="{escape(alt)}" '
        f'preserveAspectRatio="xMinYMin meet">{"".join(body)}</svg>'
    )


def _points(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


def _text(x: float, y: float, content: str, anchor: str = "middle", css: str = "t", turn: float = 0) -> str:
    turned = f' transform="rotate({turn:.0f} {x:.1f} {y:.1f})"' if turn else ""
    return f'<text class="{css}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turned}>{escape(content)}</text>'


def _linear(low: float, high: float, start: float, stop: float) -> Scale:
    return lambda value: start + (value - low) / (high - low) * (stop - start)


def _axes(panel: Lines | Scatter, x_ticks: list[float], y_ticks: list[float], width: float, height: float, unit: str,
          x_unit: str = "fraction") -> tuple[Frame, list[str]]:  # fmt: skip
    labels = tick_labels(y_ticks, unit)
    left = max(map(len, labels)) * 7.2 + (34 if panel.y_label else 12)
    right, bottom = width - RIGHT, height - BOTTOM
    at_axis = isinstance(panel, Lines) and x_ticks[0] in panel.marks
    x, y = (
        _linear(x_ticks[0], x_ticks[-1], left + (12 if at_axis else 0), right),
        _linear(y_ticks[0], y_ticks[-1], bottom, TOP),
    )
    body = []
    for tick, label in zip(y_ticks, labels, strict=True):
        body.append(f'<path class="grid" d="M{left:.1f} {y(tick):.1f}H{right:.1f}"/>')
        body.append(_text(left - 8, y(tick) + 4, label, "end"))
    body.append(f'<path class="axis" d="M{left:.1f} {bottom}H{right:.1f}"/>')
    counted = isinstance(panel, Lines) and panel.whole  # then an end between two whole numbers is none of them
    shown = [tick for tick in x_ticks if not counted or float(tick).is_integer()]
    for tick, label in zip(shown, tick_labels(shown, x_unit), strict=True):
        body.append(f'<path class="axis" d="M{x(tick):.1f} {bottom}v4"/>')
        body.append(_text(x(tick), bottom + 18, label))
    body.append(_text((left + right) / 2, height - 6, panel.x_label, css="t label"))
    if panel.y_label:
        body.append(_text(13, (TOP + bottom) / 2, panel.y_label, css="t label", turn=-90))
    return Frame(left, right, bottom, x, y, x_ticks, y_ticks), body


def x_axis(panel: Lines) -> list[float]:
    """Ticks of the x axis: whole numbers where experiences are counted, else round ones over the data."""
    low = min(min(s.x) for s in panel.series)
    high = max(max(s.x) for s in panel.series)
    if not panel.whole:
        return _inner(low, high)
    step = max(1, math.ceil((high - low) / 10))
    whole = [low + step * i for i in range(int((high - low) / step) + 1)]
    return [low - 0.5, *whole, high + 0.5] if len(whole) == 1 else [*whole, high] if whole[-1] != high else whole


def _inner(low: float, high: float) -> list[float]:
    """Round ticks inside [low, high], with its ends as first and last so that the data fill the width."""
    if high <= low:
        return [low - 1, low, low + 1]
    inside = [t for t in ticks(low, high) if low + 0.12 * (high - low) < t < high - 0.12 * (high - low)]
    return [low, *inside, high]


def y_axis(panel: Lines) -> list[float]:
    """Ticks of the y axis: the given range, or one that holds the lines and their bands."""
    if panel.y_range is not None:
        return ticks(*panel.y_range)
    shown = [v for s in panel.series for values in (s.y, s.low, s.high) for v in values if v is not None]
    shown += [y for s in panel.series for seed in s.seeds for _, y in seed]
    shown += [level for level, _ in panel.levels]
    low, high = min(shown), max(shown)
    means = [v for s in panel.series for v in s.y if v is not None]
    if panel.unit == "fraction" and min(means) >= 0 and max(means) <= 1:
        low, high = max(0.0, low), min(1.0, high)  # a band may leave the range of a fraction: cut it at the frame
    return ticks(low, high)


def _lines(panel: Lines, width: float, height: float) -> list[str]:
    frame, body = _axes(panel, x_axis(panel), y_axis(panel), width, height, panel.unit)
    x, inside = frame.x, frame.inside
    body += [f'<path class="mark" d="M{x(m):.1f} {TOP}V{frame.bottom}"/>'
             for m in panel.marks if frame.x_ticks[0] <= m <= frame.x_ticks[-1]]  # fmt: skip
    if panel.mark_label and panel.marks:
        body.append(_text(x(panel.marks[0]) - 3, TOP - 3, panel.mark_label, "start"))  # above all lines
    for level, label in panel.levels:
        body.append(f'<path class="mark" d="M{frame.left:.1f} {inside(level):.1f}H{frame.right:.1f}"/>')
        body.append(_text(frame.right, inside(level) - 5, label, "end"))
    for line in panel.series:
        band = [(a, lo, hi) for a, lo, hi in zip(line.x, line.low, line.high, strict=True)
                if lo is not None and hi is not None]  # fmt: skip
        drawn = [(x(a), inside(v)) for a, v in zip(line.x, line.y, strict=True) if v is not None]
        body.append(f'<g class="s {group_class(line.group)}" data-g="{line.group}">')
        if len(band) > 1:
            edge = [(x(a), inside(hi)) for a, _, hi in band] + [(x(a), inside(lo)) for a, lo, _ in reversed(band)]
            body.append(f'<polygon class="band" points="{_points(edge)}"/>')
        for seed in line.seeds:
            body.append(f'<polyline class="line seed" points="{_points([(x(a), inside(v)) for a, v in seed])}"/>')
        body.append(f'<polyline class="line" points="{_points(drawn)}"/>')
        if len(drawn) <= 30:
            body += [marker(line.group, a, b, 3.2) for a, b in drawn]
        body.append("</g>")
    return body + _hits(panel, frame)


def _hits(panel: Lines, frame: Frame) -> list[str]:
    """Invisible columns that tell, on hover, all values at their x."""
    at: dict[float, list[str]] = {}
    for line in panel.series:
        for a, value, low, high in zip(line.x, line.y, line.low, line.high, strict=True):
            at.setdefault(a, []).append(f"{line.label}: {_value(value, low, high, panel.unit)}")
    stops = sorted(at)
    stops = stops[:: max(1, math.ceil(len(stops) / _MOST_HITS))]
    middles = [(a + b) / 2 for a, b in pairwise(stops)]
    edges = [frame.x(e) for e in (frame.x_ticks[0], *middles, frame.x_ticks[-1])]
    tall = frame.bottom - TOP
    return [
        f'<rect class="hit" x="{low:.1f}" y="{TOP}" width="{max(high - low, 2):.1f}" height="{tall:.1f}"><title>'
        + escape("\n".join([f"{panel.x_label}: {stop:g}", *at[stop]]))
        + "</title></rect>"
        for stop, low, high in zip(stops, edges, edges[1:], strict=False)
    ]


def _value(value: float | None, low: float | None, high: float | None, unit: str) -> str:
    if low is None or high is None:
        return show(value, unit)
    return f"{show(value, unit)} [{show(low, unit)}, {show(high, unit)}]"


def _scatter(panel: Scatter, width: float, height: float) -> list[str]:
    def reach(values: list[Estimate], unit: str) -> list[float]:
        ends = [e for v in values for e in (v.mean, v.low, v.high, *v.seeds) if e is not None]
        if unit != "fraction":
            return ticks(min(0.0, *ends), max(ends))
        return ticks(max(0.0, min(ends) - 0.03) if min(ends) >= 0 else min(ends), min(1.0, max(ends) + 0.03))

    x_ticks, y_ticks = (
        reach([p.x for p in panel.points], panel.x_unit),
        reach([p.y for p in panel.points], panel.y_unit),
    )
    frame, body = _axes(panel, x_ticks, y_ticks, width, height, panel.y_unit, panel.x_unit)
    x, y = frame.x, frame.y
    if panel.path:
        joined = _points([(x(a), y(b)) for a, b in panel.path])
        body.append(f'<g class="{group_class(0)}"><polyline class="line seed" points="{joined}"/></g>')

    def span(value: Estimate, axis: Scale, bounds: list[float]) -> tuple[float, float]:
        low, high = (min(max(v or 0.0, bounds[0]), bounds[-1]) for v in (value.low, value.high))
        return axis(low), axis(high)

    for point in panel.points:
        if point.x.mean is None or point.y.mean is None:
            continue
        a, b = x(point.x.mean), y(point.y.mean)
        body.append(f'<g class="s {group_class(point.group)}" data-g="{point.group}">')
        if point.x.low is not None:
            left, right = span(point.x, x, x_ticks)
            body.append(f'<path class="error" d="M{left:.1f} {b:.1f}H{right:.1f}"/>')
        if point.y.low is not None:
            bottom, top = span(point.y, y, y_ticks)
            body.append(f'<path class="error" d="M{a:.1f} {bottom:.1f}V{top:.1f}"/>')
        for c, d in zip(point.x.seeds, point.y.seeds, strict=False):
            body.append(f'<g class="seed">{marker(point.group, x(c), y(d), 3)}</g>')
        tip = (f"{point.label}\n{panel.x_label}: {show_estimate(point.x, panel.x_unit)}\n"
               f"{panel.y_label}: {show_estimate(point.y, panel.y_unit)}\nn = {point.x.n}")  # fmt: skip
        body.append(f"<g>{marker(point.group, a, b, 6)}<title>{escape(tip)}</title></g></g>")
    return body


def _heat(panel: Heat, whole: float) -> tuple[list[str], float]:
    """The grid in a panel `whole` wide, and its height."""
    rows, columns = len(panel.rows), len(panel.columns)
    row_names, names = cut_apart(panel.rows, 16), cut_apart(panel.columns, 14)
    character = _CHARACTER * (1.25 if whole == WIDE else 1.0)  # on a narrow screen these have 15 units: style.css
    left = max(map(len, row_names)) * character + 10
    width = min(72.0, (whole - left - 6) / columns)
    height = min(34.0, max(width * 0.62, 330 / rows))
    level = max(map(len, names)) * character < width
    every_column, every_row = math.ceil(15 / width), math.ceil(13 / height)
    bottom = 24.0 if level else max(map(len, names)) * character * 0.72 + 16
    body = []
    for i, row in enumerate(panel.values):
        top = 4 + i * height
        if i % every_row == 0:
            body.append(_text(left - 8, top + height / 2 + 4, row_names[i], "end"))
        for j, cell in enumerate(row):
            body.append(_cell(panel, i, j, cell, left + j * width, top, width, height))
    below = 4 + rows * height + 16
    for j in range(0, columns, every_column):
        middle = left + (j + 0.5) * width
        turned = _text(middle + 4, below - 4, names[j], "end", turn=-45)
        body.append(_text(middle, below, names[j]) if level else turned)
    return body, 4 + rows * height + bottom


def _cell(panel: Heat, i: int, j: int, cell: Estimate, left: float, top: float, width: float, height: float) -> str:
    shape = f'x="{left + 0.75:.2f}" y="{top + 0.75:.2f}" width="{width - 1.5:.2f}" height="{height - 1.5:.2f}" rx="2"'
    row = panel.rows[i]
    if panel.accuracy:
        row = (f"after {row}" if i else "before training") + ", test set"
    tip = escape(f"{row} {panel.columns[j]}: {_value(cell.mean, cell.low, cell.high, 'fraction')}")
    if cell.mean is None:
        return f'<g><rect class="void" {shape}/><title>{tip} (not measured)</title></g>'
    shade = min(max(cell.mean, 0.0), 1.0)
    body = f'<rect class="ground" {shape}/><rect class="heat" {shape} fill-opacity="{0.04 + 0.96 * shade:.3f}"/>'
    if width >= 24:
        # Light on dark or dark on light, decided apart for the light and the dark theme (contrast ≥ 4.5 in both).
        css = f"t v l{int(shade > 0.69)} n{int(shade > 0.52)}"
        body += _text(left + width / 2, top + height / 2 + 4, f"{cell.mean:.2f}".removeprefix("0"), css=css)
    trained = f'<path class="own" d="M{left + 2:.1f} {top + height - 1:.1f}h{width - 4:.1f}"/>'
    return f"<g>{body}{trained if panel.accuracy and i == j + 1 else ''}<title>{tip}</title></g>"


def bar_text(bar: Bar, panel: Bars) -> str:
    """What stands beside a bar."""
    value = bar.value
    return _value(value.mean, value.low, value.high, panel.unit) if panel.ends else show_estimate(value, panel.unit)


def _bars(panel: Bars, width: float) -> list[str]:
    names = cut_apart([b.label for b in panel.bars], 21)
    label_width = min(150.0, max(map(len, names)) * _CHARACTER + 10)
    value_width = max(len(bar_text(b, panel)) for b in panel.bars) * _CHARACTER + 10
    reached = [
        v for b in panel.bars for v in (b.value.mean, b.value.low, b.value.high, *b.value.seeds) if v is not None
    ]
    # A quantity without values below zero has bars from the left, though an interval may reach below.
    low = min(0.0, *reached) if min(b.value.mean or 0.0 for b in panel.bars) < 0 else 0.0
    high = max(0.0, *reached)
    x = _linear(low, high if high > low else low + 1.0, label_width, width - value_width)
    body = []
    for i, bar in enumerate(panel.bars):
        top, value = 6 + 30 * i, bar.value
        start, end = sorted((x(0.0), x(value.mean or 0.0)))
        text = bar_text(bar, panel)
        body.append(f'<g class="s {group_class(bar.group)}" data-g="{bar.group}">')
        body.append(_text(label_width - 8, top + 16, names[i], "end"))
        body.append(f'<rect class="bar" x="{start:.1f}" y="{top + 3}" width="{max(end - start, 1):.1f}" '
                    f'height="18" rx="3"/>')  # fmt: skip
        if value.low is not None and value.high is not None:
            body.append(f'<path class="whisker" d="M{x(max(low, value.low)):.1f} {top + 12}H{x(value.high):.1f}"/>')
        for seed in value.seeds:
            body.append(f'<path class="whisker" d="M{x(max(low, seed)):.1f} {top + 6}v12"/>')
        body.append(_text(max(end, *(x(v) for v in (value.high or 0.0, *value.seeds))) + 8, top + 16, text, "start"))
        body.append(f"<title>{escape(bar.label)}: {escape(text)}, n = {value.n}</title></g>")
    return body


def rank_rows(count: int) -> list[tuple[bool, int]]:
    """Whether the name of each strategy stands on the left of a diagram of ranks, and in which row: no lines cross."""
    left = math.ceil(count / 2)
    return [(True, i) if i < left else (False, count - 1 - i) for i in range(count)]


def _ranks(panel: Ranks, width: float) -> tuple[list[str], float]:
    """Names on both sides of an axis of ranks, the best on the left, and the diagram's height."""
    names = cut_apart([f"{n} {m:.2f}" for n, m in zip(panel.names, panel.means, strict=True)], round(width / 21))
    side, count = max(map(len, names)) * _CHARACTER + 14, len(names)
    x = _linear(1, count, side, width - side)
    top = 46.0 if panel.length is not None else 22.0
    below = top + 14 + 9 * len(panel.alike)
    body = [f'<path class="axis" d="M{side:.1f} {top}H{width - side:.1f}"/>']
    for tick in range(1, count + 1, math.ceil(count / 12)):
        body += [f'<path class="axis" d="M{x(tick):.1f} {top}v-5"/>', _text(x(tick), top - 10, str(tick))]
    if panel.length is not None:
        end = x(1 + min(panel.length, count - 1))
        body.append(f'<path class="whisker" d="M{x(1):.1f} 8v8m0 -4H{end:.1f}m0 -4v8" fill="none"/>')
        body.append(_text(end + 6, 16, f"CD {panel.length:.2f}", "start"))
    for name, mean, (left, row) in zip(names, panel.means, rank_rows(count), strict=True):
        y, end = below + 10 + 22 * row, side - 6 if left else width - side + 6
        body.append(f'<path class="lead" d="M{x(mean):.1f} {top}V{y:.1f}H{end:.1f}"/>')
        body.append(_text(end + (-6 if left else 6), y + 4, name, "end" if left else "start", "t v"))
    for row, (first, last) in enumerate(panel.alike):
        y = top + 12 + 9 * row
        body.append(f'<path class="join" d="M{x(panel.means[first]) - 4:.1f} {y}H{x(panel.means[last]) + 4:.1f}"/>')
    return body, below + 22 * math.ceil(count / 2) + 8
