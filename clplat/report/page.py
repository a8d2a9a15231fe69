"""The report as one HTML page: no request leaves it, a content security policy forbids any.

Drawn by hand as SVG and not by plotly or matplotlib: a page of one run is some tens of kilobytes (plotly.js alone is
4.5 MB), is written in milliseconds, follows the reader's light or dark theme, and prints. Without its script it loses
only instant tooltips and the legend's buttons.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from clplat.package import __version__
from clplat.report.compare import Group
from clplat.report.data import longest_experiences, titles
from clplat.report.interaction import dip_table, frames
from clplat.report.numbers import show_estimate, unit_of
from clplat.report.parts import (
    all_metrics,
    configuration,
    experiences_table,
    missing_table,
    run_table,
    status_chips,
    tests_table,
)
from clplat.report.spec import Bars, Figure, Heat
from clplat.report.svg import NARROW, WIDE, group_class, marker, render
from clplat.report.tables import best_of, headline_metrics, reading, seeds_text, title_of, tuned_texts

NOTES = """
<p><b>Means and intervals.</b> Over seeds: mean ± half of the 95 % interval by Student's t with n − 1 degrees of
freedom; in square brackets, both ends of one that was cut at the end of a metric's range. Fewer than three seeds have
no interval and no test, which one degree of freedom would make void: of two, both values stand in round brackets, and
figures show each. If any run of a strategy is complete,
only complete runs count; of several runs with one seed, the last given.</p>
<p><b>Tests.</b> Two-sided paired t-tests over the seeds that both strategies share, with Holm's correction over the
comparisons of one metric. The sign-flip permutation test assumes less, but with n seeds it cannot go below
2 / 2<sup>n</sup>. The best strategy is chosen by the same data: read the p-values as a guard against noise.</p>
<p><b>Ranks.</b> Where streams share strategies, these are ranked in each by their mean and compared by Friedman's test
(exact), Nemenyi's critical difference, and Wilcoxon's signed ranks for each pair (exact, Holm). All take streams for
independent; those cut from one data set are not, and then the p-values are too small.</p>
<p><b>Streams.</b> Numbers of different streams, of one stream with different options, or of test and validation data
never share a table; a stream whose figures are of validation data says so in its name.</p>
"""


def build_page(
    streams: Sequence[Sequence[Group]], figures: Sequence[Sequence[Figure]], over: Sequence[Figure] = (),
    ranks: str = "",
) -> str:  # fmt: skip
    """The whole document.

    Args:
        figures: those of each stream.
        over: those over all streams.
        ranks: what is said of strategies over streams, as HTML.
    """
    sections = [_section(i, groups, drawn, len(streams) > 1) for i, (groups, drawn) in
                enumerate(zip(streams, figures, strict=True))]  # fmt: skip
    notes = f'<section class="card notes"><h2>How to read this</h2>{NOTES}</section>'
    top = f"{_facts(streams)}\n{_contents(streams)}"
    diagrams = f'<div class="figures">{"".join(figure_card(f, 1) for f in over)}</div>' if over else ""
    return document("clplat report", _title(streams), top, ranks + diagrams + "".join(sections) + notes,
                    "Tables and figures\nstand beside this file.")  # fmt: skip


def document(eyebrow: str, title: str, top: str, main: str, beside: str, more: str = "", form: str = "none") -> str:
    """A self-contained page around `main`; `top`, `main` and `beside` (for the footer) are HTML already.

    Args:
        more: name of a further pair of style and script.
        form: where forms may go: none, or self.
    """
    style, script = (
        "".join(Path(__file__).with_name(f).read_text() for f in files)
        for files in (["style.css", *([f"{more}.css"] if more else [])], ["page.js", *([f"{more}.js"] if more else [])])
    )
    pictures = "img-src data:; " if 'src="data:image/png' in main else ""
    policy = (f"default-src 'none'; {pictures}style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
              f"base-uri 'none'; form-action '{form}'")  # fmt: skip
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title)}</title>
<style>{style}</style>
</head>
<body>
<header class="top"><div class="wrap">
<p class="eyebrow">{eyebrow}</p>
<h1>{escape(title)}</h1>
{top}
</div></header>
<main class="wrap">
{main}
</main>
<footer class="wrap">Written by clplat {escape(__version__)}. {beside}</footer>
<script>{script}</script>
</body>
</html>
"""


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _title(streams: Sequence[Sequence[Group]]) -> str:
    """Options make settings of a strategy, not strategies."""
    groups = [g for s in streams for g in s]
    strategies, settings = ({getattr(g, part) for g in groups} for part in ("strategy", "label"))
    what = f"{len(strategies)} strategies" if len(strategies) > 1 else groups[0].strategy
    if len(settings) > len(strategies):
        what = f"{len(settings)} settings of {what}"
    elif len(settings) == 1:
        what = groups[0].label
    return f"{what} on {f'{len(streams)} streams' if len(streams) > 1 else groups[0].stream}"


def _facts(streams: Sequence[Sequence[Group]]) -> str:
    groups = [g for s in streams for g in s]
    runs = [run for g in groups for run in g.runs]

    def distinct(values: Iterable[Any], most: int = 6) -> str:
        kept = list(dict.fromkeys(str(v) for v in values if v is not None))
        return ", ".join(kept[:most]) + (f" and {len(kept) - most} more" if len(kept) > most else "")

    facts = {
        "Strategy": distinct(g.strategy for g in groups),
        "Stream": distinct(g.stream for g in groups),
        "Backbone": distinct(g.backbone for g in groups),
        "Seeds": distinct((r.get("seed") for r in sorted(runs, key=lambda r: str(r.get("seed")).zfill(20))), 12),
        "Commit": distinct((str(r["git_commit"])[:10] for r in runs if r.get("git_commit")), 3),
        "Version": distinct(r.get("clplat") for r in runs),
    }
    cells = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v)
    return f'<dl class="facts">{cells}<div><dt>Status</dt><dd>{status_chips(runs)}</dd></div></dl>'


def _contents(streams: Sequence[Sequence[Group]]) -> str:
    if len(streams) < 2:
        return ""
    links = "".join(f'<li><a href="#stream-{i}">{escape(g[0].stream)}</a></li>' for i, g in enumerate(streams))
    return f'<nav aria-label="Streams"><ul>{links}</ul></nav>'


def _section(index: int, groups: Sequence[Group], figures: Sequence[Figure], several: bool) -> str:
    head = f"<h2>Stream: {escape(groups[0].stream)}</h2>" if several else ""
    experiences = longest_experiences(list(groups))
    return f"""<section class="stream" id="stream-{index}">{head}
{_tiles(groups[0]) if len(groups) == 1 else results_table(groups)}
{tests_table(groups)}
{dip_table(groups)}
{legend(groups)}
<div class="figures">{"".join(figure_card(f, len(groups)) for f in figures)}</div>
{frames(groups)}
{all_metrics(groups)}
{missing_table(groups)}
<section class="card"><h3>What was run</h3>
{run_table(groups)}
{experiences_table(experiences, titles(groups))}
{configuration(groups)}</section>
</section>"""


def _tiles(group: Group) -> str:
    tiles = []
    for name in headline_metrics([group]):
        value = group.estimate(name)
        if value.mean is None:
            continue
        mean, mark, spread = _parted(show_estimate(value, unit_of(name)))
        more = f'<span class="spread">{mark}{escape(spread)}</span>' if spread else ""
        tiles.append(f"<div><dt>{escape(title_of(name))}</dt><dd>{escape(mean)}{more}</dd></div>")
    if not tiles:
        return '<p class="card empty">Nothing was measured before this run ended.</p>'
    note = f'<p class="under">{len(group.counted)} seeds</p>' if len(group.counted) > 1 else ""
    note += tuned_notes([group])
    return f'<section class="card"><h3>In short</h3><dl class="tiles">{"".join(tiles)}</dl>{note}</section>'


def results_table(groups: Sequence[Group], rivals: Sequence[Group] | None = None) -> str:
    """Groups × headline metrics of one stream.

    Args:
        rivals: groups that may have the best mean; None: all.
    """
    names = headline_metrics(groups)
    best = {name: best_of(groups if rivals is None else rivals, name) for name in names}
    head = "".join(f'<th scope="col" class="num">{escape(title_of(n))}</th>' for n in names)
    rows = []
    for i, group in enumerate(groups):
        cells = "".join(f'<td class="num{" best" if best[n] is group else ""}">{_spread(group, n)}</td>' for n in names)
        rows.append(f'<tr data-g="{i}"><th scope="row" class="named">{swatch(i)}{_named(group)}</th>'
                    f'<td class="num">{seeds_text(group)}</td>{cells}</tr>')  # fmt: skip
    return f"""<section class="card"><h3>Results</h3>
<div class="scroll" tabindex="0" role="region" aria-label="Results"><table>
<caption><span>{escape(reading(groups))}. Bold: the best mean. Arrows point to better.</span></caption>
<thead><tr><th scope="col">Strategy</th><th scope="col" class="num">seeds</th>{head}</tr></thead>
<tbody>{"".join(rows)}</tbody></table></div>{tuned_notes(groups)}</section>"""


def tuned_notes(groups: Sequence[Group]) -> str:
    """Protocol, trials and cost of each group whose configuration was chosen by a sweep."""
    return "".join(f'<p class="under">{escape(line)}</p>' for line in tuned_texts(groups))


def _named(group: Group) -> str:
    """Its label, and its strategy where the label does not begin with it."""
    own = "" if group.label.startswith(group.strategy) else f' <span class="why">{escape(group.strategy)}</span>'
    return escape(group.label) + own


def _spread(group: Group, metric: str) -> str:
    text = show_estimate(group.estimate(metric), unit_of(metric))
    mean, mark, rest = _parted(text)
    return f'{escape(mean)}<span class="spread">{mark}{escape(rest)}</span>' if mark else escape(text)


def _parted(text: str) -> tuple[str, str, str]:
    """A mean, what marks its spread (± or a bracket), and the spread."""
    mark = next((m for m in (" ± ", " [", " (") if m in text), "")
    return (text, "", "") if not mark else text.partition(mark)


def swatch(index: int) -> str:
    """Line and marker of a group."""
    dash = f'<path class="line" d="M1 8H23"/>{marker(index, 12, 8, 4)}'
    return f'<svg class="swatch s {group_class(index)}" viewBox="0 0 24 16" aria-hidden="true">{dash}</svg>'


def legend(groups: Sequence[Group]) -> str:
    """Buttons that hide a group in the figures of a stream; none for a single one."""
    if len(groups) < 2:
        return ""
    buttons = "".join(
        f'<button type="button" data-g="{i}" aria-pressed="true">{swatch(i)}{escape(g.label)}</button>'
        for i, g in enumerate(groups)
    )
    return f'<div class="legend" role="group" aria-label="Strategies shown in the figures">{buttons}</div>'


def figure_card(figure: Figure, groups: int) -> str:
    """The figure in its frame.

    Args:
        groups: of the stream.
    """
    panels = []
    size, width = {1: ("one", WIDE), 2: ("two", WIDE), 4: ("two", WIDE)}.get(len(figure.panels), ("many", NARROW))
    if all(isinstance(panel, Bars) for panel in figure.panels):
        size, width = "many", NARROW  # wide ones have larger letters on small screens, for which bars have no room
    for panel in figure.panels:
        said = len(figure.panels) == 1 and (isinstance(panel, Heat) or panel.title == figure.title)
        title = "" if said else f"<h4>{escape(panel.title)}</h4>"
        own = f' data-g="{panel.group}"' if isinstance(panel, Heat) and panel.group is not None and groups > 1 else ""
        panels.append(f'<div class="panel"{own}>{title}{render(panel, f"{panel.title}. {figure.alt}", width)}</div>')
    return (f'<figure class="card {size}"><h3>{escape(figure.title)}</h3><div class="panels">{"".join(panels)}</div>'
            f"<figcaption>{escape(figure.caption)}</figcaption></figure>")  # fmt: skip
