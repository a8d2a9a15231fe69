"""A figure as an SVG file of its own: written in a millisecond, and shown by browsers and by MLflow's artifact view."""

from __future__ import annotations

import re
from html import escape
from pathlib import Path

from clplat.report.naming import cut_apart
from clplat.report.spec import Bars, Figure, Heat, Lines, Ranks
from clplat.report.svg import NARROW, WIDE, group_class, marker, render

_GAP, _HEAD = 24, 26
_SIZE = re.compile(r'viewBox="0 0 (\d+) (\d+)"')


def standalone(figure: Figure) -> str:
    """The whole figure, its panels at most three a row, with a legend below if it has several groups."""
    width, columns = (WIDE, len(figure.panels)) if len(figure.panels) < 3 else (NARROW, 3)
    body, top, height = [], _GAP, 0
    titles = cut_apart([p.title for p in figure.panels], width // 8)
    for i, panel in enumerate(figure.panels):
        column = i % columns
        if i and column == 0:
            top, height = top + height + _HEAD + _GAP, 0
        drawn = render(panel, panel.title, width)
        size = _SIZE.search(drawn)
        tall = int(size[2]) if size else 0
        left, height = _GAP + column * (width + _GAP), max(height, tall)
        body.append(f'<text class="title" x="{left}" y="{top + 12}">{escape(titles[i])}</text>')
        placed = f'<svg x="{left}" y="{top + _HEAD}" width="{width}" height="{tall}"'
        body.append(drawn.replace("<svg", placed, 1))
    top += height + _HEAD + _GAP
    whole = _GAP + columns * (width + _GAP)
    legend, top = _legend(figure, whole, top)
    style = Path(__file__).with_name("style.css").read_text()
    frame = f'viewBox="0 0 {whole} {top}" width="{whole}" height="{top}"'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {frame} role="img"><title>{escape(figure.title)}</title>'
        f"<desc>{escape(figure.alt)}</desc><style>{escape(style, quote=False)}</style>"
        f'<rect class="paper" width="{whole}" height="{top}"/>{"".join(body)}{legend}</svg>\n'
    )


def _legend(figure: Figure, width: int, top: int) -> tuple[str, int]:
    """Its markup and where the figure then ends."""
    groups: dict[int, str] = {}
    for panel in figure.panels:
        if not isinstance(panel, Heat | Bars | Ranks):
            groups |= {s.group: s.label for s in (panel.series if isinstance(panel, Lines) else panel.points)}
    if len(groups) < 2:
        return "", top
    parts, left = [], _GAP
    for index, label in zip(groups, cut_apart(list(groups.values()), 40), strict=True):
        wide = 40 + 8 * len(label)
        if left > _GAP and left + wide > width:
            left, top = _GAP, top + 22
        parts.append(f'<g class="s {group_class(index)}"><path class="line" d="M{left} {top}h22"/>'
                     f'{marker(index, left + 11, top)}</g><text class="t" x="{left + 29}" y="{top + 4}">'
                     f"{escape(label)}</text>")  # fmt: skip
        left += wide
    return "".join(parts), top + 22
