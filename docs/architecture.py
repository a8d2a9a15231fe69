"""Draws docs/images/architecture.svg: the rooms of clplat/, and what is written against them, by their imports.

A room stands one floor above the highest room it imports. An arrow is an import that no longer way down covers; all
imports are named in the box. The contract lies under everything. `docs/generate.py` writes and checks the file.
"""

from __future__ import annotations

import ast
import itertools
import textwrap
from collections.abc import Iterator
from graphlib import TopologicalSorter
from math import fsum
from pathlib import Path

import clplat

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "images" / "architecture.svg"
BASE, OUTSIDE = "contract", ("strategies", "streams")
BOX, LANE, GAP, FLOOR, HEIGHT, MARGIN = 204, 14, 26, 112, 74, 16  # pixels
STYLE = """
svg { color-scheme: light dark; --page: #ffffff; --card: #f1f5fa; --ink: #1b2330; --muted: #566070; --line: #0b62b8; }
@media (prefers-color-scheme: dark) {
  svg { --page: #0e1218; --card: #1b2430; --ink: #e8edf4; --muted: #a3afbf; --line: #7db5f5; }
}
text { font-family: system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; text-anchor: middle; }
.page { fill: var(--page); }
.room { fill: var(--card); stroke: var(--muted); }
.outside { stroke-dasharray: 5 4; }
.name { fill: var(--ink); font-size: 15px; font-weight: 600; }
.what { fill: var(--muted); font-size: 11px; }
.way { fill: none; stroke: var(--line); stroke-width: 1.5; }
.tip { fill: var(--line); }
"""


def room(name: str) -> str:
    """The room of a dotted name: its folder; a file at the top of clplat/ belongs to the contract, but api and cli."""
    parts = name.split(".")
    if parts[0] == "clplat" and len(parts) > 1:
        home = clplat._HOME.get(parts[1]) if len(parts) == 2 else None  # a name that the package hands out
        parts = [*home.partition(":")[0].split("."), parts[1]] if home else parts[1:]
    folder = (ROOT / "clplat" / parts[0]).is_dir()
    return parts[0] if folder or parts[0] in ("api", "cli") else BASE


def imported(path: Path) -> Iterator[str]:
    """Dotted names of this project imported anywhere in a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("clplat."))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "clplat":
            yield from (f"{node.module}.{a.name}" for a in node.names)


def imports() -> dict[str, set[str]]:
    """Each room with the rooms that its files import."""
    found: dict[str, set[str]] = {BASE: set()}
    for top in ("clplat", *OUTSIDE):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            if parts[:2] in (("clplat", name) for name in OUTSIDE) or parts[1] in ("__init__", "__main__"):
                continue  # the links, and the package that hands out names of every room
            own = room(".".join(parts))
            found.setdefault(own, set()).update({room(name) for name in imported(path)} - {own})
    return found


def below(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """Each room with all that it reaches."""
    reached: dict[str, set[str]] = {}
    for name in TopologicalSorter(graph).static_order():
        reached[name] = graph[name].union(*(reached[target] for target in graph[name]))
    return reached


def ways(graph: dict[str, set[str]], floor: dict[str, int]) -> list[list[str]]:
    """Arrows, each with a lane `a>b@floor` on every floor it passes."""
    reached, found = below(graph), []
    for name, targets in sorted(graph.items()):
        for target in sorted(targets):
            if target != BASE and not any(target in reached[other] for other in targets):
                lanes = [f"{name}>{target}@{level}" for level in range(floor[name] - 1, floor[target], -1)]
                found.append([name, *lanes, target])
    return found


def arranged(floors: list[list[str]], steps: list[tuple[str, str]]) -> dict[str, float]:
    """The middle of each box and lane: floors are reordered for few crossings and short ways."""
    x = {n: float(k * (BOX + GAP)) for row in floors for k, n in enumerate(row)}
    near: dict[str, list[str]] = {name: [] for name in x}
    for a, b in steps:
        near[a].append(b)
        near[b].append(a)
    for _ in range(40):
        for row in [*floors, *floors[::-1]]:
            best = min(itertools.permutations(sorted(row)), key=lambda order: _cost(order, near, x))
            x |= _placed(best, near, x)
    return x


def _placed(order: tuple[str, ...], near: dict[str, list[str]], x: dict[str, float]) -> dict[str, float]:
    """Places in this order, as near to the middle of what each is joined to as the widths allow."""
    wish = [fsum(x[m] for m in near[n]) / len(near[n]) if near[n] else x[n] for n in order]
    offset = [0.0]
    for a, b in itertools.pairwise(order):
        offset.append(offset[-1] + (_width(a) + _width(b)) / 2 + GAP)
    blocks: list[list[float]] = []  # neighbours that touch share the mean of their wishes
    for want, shift in zip(wish, offset, strict=True):
        blocks.append([want - shift])
        while len(blocks) > 1 and fsum(blocks[-2]) / len(blocks[-2]) >= fsum(blocks[-1]) / len(blocks[-1]):
            last = blocks.pop()
            blocks[-1] += last
    starts = [fsum(block) / len(block) for block in blocks for _ in block]
    return {n: round(start + shift, 3) for n, start, shift in zip(order, starts, offset, strict=True)}


def _cost(order: tuple[str, ...], near: dict[str, list[str]], x: dict[str, float]) -> float:
    """How far things stand from what they are joined to; squares, so that no way is long."""
    placed = _placed(order, near, x)
    return round(fsum((placed[n] - x[m]) ** 2 for n in order for m in near[n]), 1)


def _width(name: str) -> int:
    return LANE if ">" in name else BOX


def picture() -> str:
    """The SVG."""
    graph = imports()
    floor: dict[str, int] = {}
    for name in TopologicalSorter(graph).static_order():
        floor[name] = max((floor[target] + 1 for target in graph[name]), default=0)
    arrows, top = ways(graph, floor), max(floor.values())
    floors: list[list[str]] = [[] for _ in range(top + 1)]
    for name in sorted({n for way in arrows for n in way} | graph.keys() - {BASE}):
        floors[int(name.partition("@")[2]) if "@" in name else floor[name]].append(name)
    x = arranged(floors[1:], [step for way in arrows for step in itertools.pairwise(way)])
    left = min(x[n] - _width(n) / 2 for n in x) - MARGIN
    x = {n: round(value - left) for n, value in x.items()}
    width = max(x[n] + _width(n) // 2 for n in x) + MARGIN
    y = {n: MARGIN + (top - level) * FLOOR for level, row in enumerate(floors) for n in row}
    height = MARGIN + top * FLOOR + HEIGHT + MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'role="img"><title>Rooms of clplat</title><desc>Each room stands above those it imports: '
        + "; ".join(f"{n}: {', '.join(sorted(t)) or 'nothing'}" for n, t in sorted(graph.items()))
        + f'.</desc><style>{STYLE}</style><rect class="page" width="{width}" height="{height}"/>'
    ]
    parts += [_way(way, arrows, x, y) for way in arrows]
    for name in sorted(graph.keys() - {BASE}):
        parts.append(_box(name, x[name], y[name], BOX, ", ".join(sorted(graph[name] - {BASE})) or "the contract only"))
    files = sorted(p.stem for p in (ROOT / "clplat").glob("[a-z]*.py") if room(f"clplat.{p.stem}") == BASE)
    words = f"{', '.join(files)}: what users write against; every room may import it"
    parts.append(_box(BASE, width // 2, MARGIN + top * FLOOR, width - 2 * MARGIN, words))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(name: str, middle: int, upper: int, width: int, words: str) -> str:
    lines = textwrap.wrap(words, width // 7, break_long_words=False)
    first = upper + (HEIGHT - 19 - 13 * len(lines)) // 2 + 13
    kind = "room outside" if name in OUTSIDE else "room"
    shown = [
        f'<rect class="{kind}" x="{middle - width // 2}" y="{upper}" width="{width}" height="{HEIGHT}" rx="8"/>',
        f'<text class="name" x="{middle}" y="{first}">{name}</text>',
        *(f'<text class="what" x="{middle}" y="{first + 3 + 13 * k}">{t}</text>' for k, t in enumerate(lines, 1)),
    ]
    return "".join(shown)


def _way(way: list[str], arrows: list[list[str]], x: dict[str, int], y: dict[str, int]) -> str:
    """One arrow, from a place of its own under its room to a place of its own over its target."""
    leaving = sorted((w for w in arrows if w[0] == way[0]), key=lambda w: (x[w[1]], w))
    coming = sorted((w for w in arrows if w[-1] == way[-1]), key=lambda w: (x[w[-2]], w))
    start = x[way[0]] + 24 * leaving.index(way) - 12 * (len(leaving) - 1)
    end = x[way[-1]] + 24 * coming.index(way) - 12 * (len(coming) - 1)
    path, last, from_y = f"M{start} {y[way[0]] + HEIGHT}", start, y[way[0]] + HEIGHT
    for name in way[1:]:
        here, to_y = (end, y[name] - 7) if name == way[-1] else (x[name], y[name])
        middle = (from_y + to_y) // 2
        path += f"C{last} {middle} {here} {middle} {here} {to_y}"
        if name != way[-1]:
            path += f"V{to_y + HEIGHT}"
        last, from_y = here, to_y + HEIGHT
    tip = y[way[-1]]
    return f'<path class="way" d="{path}"/><path class="tip" d="M{end} {tip}l-4 -8h8z"/>'
