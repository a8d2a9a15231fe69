"""The dashboard as one HTML page, in the report's style and with its parts.

Drawn as SVG like the report and not by plotly, whose script alone (4.8 MB) would fill the page's 5 MB, ships in no
smaller bundle with its Python package, and knows nothing of the reader's light or dark theme.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from html import escape

from clplat.report.compare import Group, value_of
from clplat.report.dashboard import FACETS, INCOMPLETE, Run, Standing, View, facets
from clplat.report.dashboard_figures import front_figure, places
from clplat.report.interaction import dip_table
from clplat.report.numbers import NONE, show, show_estimate, unit_of
from clplat.report.page import NOTES, document, figure_card, legend, results_table, swatch
from clplat.report.parts import all_metrics, chip, missing_table, status_chips, table, tests_table
from clplat.report.tables import best_of, title_of, tuned_texts

_OWN_NOTES = """
<p><b>Leaderboard.</b> Strategies by streams, each stream on its primary metric: mean ± half of the 95 % interval over
seeds, and the rank of that mean among the strategies of the stream (1 is best; equal means share a rank). Ranks say
nothing of how far apart means are. A name in two streams may stand for other options: each stream's runs say them.</p>
<p><b>Incomplete.</b> Where a strategy has complete runs, others enter no mean; “3 of 5” says so beside it. One that has
none yet is called incomplete, is shown with what it measured so far, and takes no rank. Running: it has not told its
end, since it is under way or was killed.</p>
"""

Link = Callable[[Run], str | None]


def build_dashboard(view: View, link: Link, *, served: bool) -> str:
    """The whole document.

    Args:
        link: address of a run's report, or None where there is none.
        served: filters are sent to the server, which computes anew; else the page's script hides what does not match.
    """
    several = len(view.standings) > 1
    parts = [
        _board(view), *(_ranking(view)), *(_stream(i, s) for i, s in enumerate(view.standings)), _studies(view),
        _runs(view, link), f'<section class="card notes"><h2>How to read this</h2>{_OWN_NOTES}{NOTES}</section>',
        _data(view),
    ]  # fmt: skip
    top = f"{_facts(view, served)}\n{_filters(view, served)}\n{_contents(view) if several else ''}"
    beside = "Anew at each visit." if served else "As of the time above; written anew by the same command."
    return document("clplat dashboard", _title(view), top, "\n".join(parts), beside, "dashboard",
                    "self" if served else "none")  # fmt: skip


def _title(view: View) -> str:
    if not view.standings:
        return f"{len(view.studies)} stud{'y' if len(view.studies) == 1 else 'ies'}"
    count = len({g.strategy for s in view.standings for g in s.groups})
    strategies = f"{count} strateg{'y' if count == 1 else 'ies'}"
    return f"{strategies} on {len(view.standings)} stream{'' if len(view.standings) == 1 else 's'}"


def _facts(view: View, served: bool) -> str:
    shown = len(view.runs)
    commits = view.choices["commit"]
    facts = {
        "Read from": view.source,
        "Read at": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()),
        "Runs": f"{shown}" if shown == view.total else f"{shown} of {view.total}",
        "Commits": ", ".join(commits[:3]) + (f" and {len(commits) - 3} more" if len(commits) > 3 else ""),
        "Chosen": ", ".join(f"{facet} {value}" for facet, values in view.wanted.items() for value in values),
    }
    cells = "".join(f"<div><dt>{k}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items() if v)
    status = f"<div><dt>Status</dt><dd>{status_chips(view.runs)}</dd></div>" if view.runs else ""
    notes = "".join(f'<p class="under">{escape(note)}</p>' for note in view.notes)
    refresh = '<a class="button" href="">Refresh</a>' if served else ""
    return f'<dl class="facts">{cells}{status}</dl>{notes}{refresh}'


def _filters(view: View, served: bool) -> str:
    fields = []
    for facet in FACETS:
        chosen = list(view.wanted.get(facet, ()))
        options = [f'<option value="">all ({len(view.choices[facet])})</option>']
        options += [f"<option{' selected' if value in chosen[:1] else ''}>{escape(value)}</option>"
                    for value in view.choices[facet]]  # fmt: skip
        fields.append(f'<label>{facet.capitalize()} <select name="{facet}">{"".join(options)}</select></label>')
    kind = " data-served" if served else ""
    clear = '<a href="?">Show all</a>' if served and view.wanted else ""
    return (f'<form class="filters" method="get" role="search" aria-label="Filter runs"{kind}>{"".join(fields)}'
            f'<button type="submit">Show</button>{clear}<p role="status" class="under"></p></form>')  # fmt: skip


def _contents(view: View) -> str:
    links = [("board", "Leaderboard"), *((f"stream-{i}", s.stream) for i, s in enumerate(view.standings))]
    links += [*([("studies", "Sweeps")] if view.studies else []), ("runs", "Runs")]
    items = "".join(f'<li><a href="#{anchor}">{escape(name)}</a></li>' for anchor, name in links)
    return f'<nav aria-label="Parts"><ul>{items}</ul></nav>'


def _board(view: View) -> str:
    """Strategies × streams."""
    if not view.rows:
        return '<section id="board"><p class="card empty">No run to rank: all are trials of sweeps.</p></section>'
    best = [best_of([g for g, r in zip(s.groups, s.ranks, strict=True) if r is not None], s.metric)
            for s in view.standings]  # fmt: skip
    head = "".join(
        f'<th scope="col" class="num" data-col="{i}"><a href="#stream-{i}">{escape(s.stream)}</a>'
        f'<span class="why">{escape(title_of(s.metric))}</span></th>' for i, s in enumerate(view.standings)
    )  # fmt: skip
    rows = []
    for label, where in view.rows:
        cells = "".join(_cell(i, j, s, best[i]) for i, (j, s) in enumerate(zip(where, view.standings, strict=True)))
        rows.append(f'<tr><th scope="row" class="named">{escape(label)}</th>{cells}</tr>')
    caption = "Mean over seeds and its 95 % interval; #: rank among those of the stream that have a complete run"
    return f"""<section class="card" id="board"><h2>Leaderboard</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Leaderboard"><table class="board">
<caption><span>{escape(caption)}. Marked: the best mean.</span></caption>
<thead><tr><th scope="col">Strategy</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>"""


def _cell(stream: int, position: int | None, standing: Standing, best: Group | None) -> str:
    if position is None:
        return f'<td class="num" data-col="{stream}">{NONE}</td>'
    group, rank = standing.groups[position], standing.ranks[position]
    text = show_estimate(group.estimate(standing.metric), unit_of(standing.metric))
    place = f"#{rank:g} of {standing.ranked}" if rank is not None else "no rank"
    css = "num best" if group is best else "num"
    counted = len(group.counted)
    seeds = f"{counted}" if counted == len(group.runs) else f"{counted} of {len(group.runs)}"
    chosen = ", tuned" if tuned_texts([group]) else ""
    return (f'<td class="{css}" data-col="{stream}" data-at="{stream}-{position}">{escape(text)}'
            f'<span class="why">{place}, {seeds} run{"" if seeds == "1" else "s"}{chosen}</span></td>')  # fmt: skip


def _ranking(view: View) -> list[str]:
    """Mean ranks over streams, for each metric that several share."""
    cards = []
    for r in view.rankings:
        where = "validation data of " if r.validation else ""
        rows = [[escape(label), f"{mean:.2f}", *(f"{ranks[j]:g}" for ranks in r.ranks)]
                for j, (label, mean) in enumerate(zip(r.strategies, r.means, strict=True))]  # fmt: skip
        left = f" Not ranked, since some stream lacks them: {', '.join(r.left_out)}." if r.left_out else ""
        body = table(f"Ranks on {r.metric.replace('_', ' ')}, {where}{len(r.streams)} streams",
                     ["Strategy", "mean rank", *map(escape, r.streams)], rows)  # fmt: skip
        cards.append(f'<section class="card"><h2>Over streams</h2>{body}<p class="under">{escape(r.said() + left)}</p>'
                     "</section>")  # fmt: skip
    return cards


def _stream(index: int, standing: Standing) -> str:
    groups, figures = standing.groups, standing.figures
    whole = [group for group in groups if not group.label.endswith(INCOMPLETE)]
    drawn = "".join(figure_card(figure, len(groups)) for figure in figures)
    numbers = (
        f"<details class='card all'><summary>All numbers, and what they mean</summary>{all_metrics(groups)}</details>"
    )
    return f"""<section class="stream" id="stream-{index}"><h2>{escape(standing.stream)}</h2>
{results_table(groups, whole)}
{tests_table(whole)}
{legend(groups)}
<div class="figures">{drawn}</div>
{dip_table(groups)}
{numbers}
{missing_table(groups)}
</section>"""


def _studies(view: View) -> str:
    if not view.studies:
        return ""
    rows = []
    for study in view.studies:
        best = study.get("best") or {}
        metrics = study.get("metrics") or [study.get("metric")]
        values = ", ".join(f"{title_of(m)} {show(v, unit_of(m))}"
                           for m, v in zip(metrics, best.get("values") or [], strict=False))  # fmt: skip
        told = [values, *(study.get(k) for k in ("protocol", "effort", "gain"))]
        rows.append([escape(str(study.get("study"))), *(escape(str(what or NONE)) for what in told)])
    head = ["Study", "Best, on validation data", "Protocol", "Spent on tuning", "What tuning gained"]
    drawn = []
    for figure in map(front_figure, view.studies):
        if figure is not None:
            keys = "".join(f'<span class="key">{swatch(i)}{what}</span>' for i, what in places(figure).items())
            drawn.append(figure_card(figure, 1).replace("</h3>", f'</h3><p class="keys">{keys}</p>', 1))
    body = table("Studies: figures of validation data, chosen by them", head, rows, words=5)
    return f"""<section id="studies"><h2>Sweeps</h2><div class="card">{body}</div>
<div class="figures">{"".join(drawn)}</div></section>"""


def _runs(view: View, link: Link) -> str:
    """Every run, whatever became of it, with a way to its report."""
    of = {id(run): (i, s, g) for i, s in enumerate(view.standings) for g in s.groups for run in g.runs}
    rows = []
    for index, run in enumerate(view.runs):
        _, standing, group = of[id(run)]
        status = chip(str(run.get("status")))
        if not any(run is counted for counted in group.counted):
            status += ' <span class="why">not in the means</span>'
        address = link(run)
        name = escape(str(run["run_name"]))
        name = f'<a href="{escape(address)}">{name}</a>' if address else f'{name}<span class="why">no report</span>'
        own = facets(run)
        started = run["started"] and time.strftime("%Y-%m-%d %H:%M", time.gmtime(run["started"]))
        cells = [
            escape(group.label), escape(standing.stream), status, escape(", ".join(own["commit"]) or NONE),
            escape(", ".join(own["tag"]) or NONE), escape(started or NONE), escape(str(run.get("seed"))),
            show(run["seconds"], "seconds"), escape(show(value_of(run, standing.metric), unit_of(standing.metric))),
        ]  # fmt: skip
        body = "".join(f"<td{_css(k, 6)}>{cell}</td>" for k, cell in enumerate(cells))
        rows.append(f'<tr data-run="{index}"><th scope="row">{name}</th>{body}</tr>')
    head = ["Run and its report", "Strategy", "Stream", "Status", "Commit", "Tags", "Started (UTC)", "seed", "time",
            "primary metric"]  # fmt: skip
    top = "".join(f'<th scope="col"{_css(k, 7)}>{h}</th>' for k, h in enumerate(head))
    return f"""<section class="card" id="runs"><h2>Runs</h2>
<div class="scroll" tabindex="0" role="region" aria-label="Runs"><table>
<caption><span>Every run that was chosen, oldest first; its name leads to its report</span></caption>
<thead><tr>{top}</tr></thead><tbody>{"".join(rows)}</tbody></table></div></section>"""


def _css(column: int, words: int) -> str:
    return "" if column < words else ' class="num"'


def _data(view: View) -> str:
    """What the page's script filters by: facets of each run, and the counted runs of each group."""
    at = {id(run): i for i, run in enumerate(view.runs)}
    groups = {f"{i}-{j}": [at[id(run)] for run in g.counted]
              for i, s in enumerate(view.standings) for j, g in enumerate(s.groups)}  # fmt: skip
    content = json.dumps({"runs": [facets(run) for run in view.runs], "groups": groups}, separators=(",", ":"))
    safe = content.replace("<", "\\u003c")
    return f'<script type="application/json" id="facts">{safe}</script>'


def size_note(page: str) -> str | None:
    """What to say of a page that has grown beyond what opens at once."""
    size = len(page.encode())
    return None if size < 5_000_000 else f"the page has {size / 1e6:.1f} MB: --stream or --strategy take a part of it"


def wanted_of(query: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Facets of a form's fields, empty ones left out."""
    return {facet: kept for facet in FACETS if (kept := [v for v in query.get(facet, ()) if v])}
