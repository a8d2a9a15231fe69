"""Tables of the page: tests, metrics with their meaning, what was not measured and why, runs, configuration."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from clplat.config.settings import flat
from clplat.report.compare import Comparison, Group, against_best, metric_info, metric_names, value_of
from clplat.report.numbers import NONE, show, show_estimate, show_p, unit_of
from clplat.report.tables import headline_metrics, primary_metric, reading, title_of, untested

_NOT_SHOWN = ("output", "data_root", "name", "tracking.uri")


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], words: int = 1) -> str:
    """A table in its scrolling frame; cells are HTML already. The first cell of a row is its header.

    Args:
        words: columns from the left that hold words; the others hold numbers and stand right.
    """
    css = ["" if i < words else ' class="num"' for i in range(len(head))]
    top = "".join(f'<th scope="col"{c}>{h}</th>' for h, c in zip(head, css, strict=True))
    body = "".join(
        "<tr>"
        + "".join(f'<th scope="row">{v}</th>' if i == 0 else f"<td{css[i]}>{v}</td>" for i, v in enumerate(row))
        + "</tr>"
        for row in rows
    )
    name = escape(caption)
    return (f'<div class="scroll" tabindex="0" role="region" aria-label="{name}"><table><caption><span>{name}'
            f"</span></caption><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>")  # fmt: skip


def chip(status: str) -> str:
    """A status in words, coloured."""
    css = status if status in ("complete", "interrupted", "failed") else "other"
    return f'<span class="chip {css}">{escape(status)}</span>'


def status_chips(runs: Sequence[dict[str, Any]]) -> str:
    """Each status met and how many runs have it."""
    statuses = [str(run.get("status")) for run in runs]
    if len(statuses) == 1:
        return chip(statuses[0])
    return " ".join(f"{statuses.count(s)} {chip(s)}" for s in dict.fromkeys(statuses))


def tests_table(groups: Sequence[Group]) -> str:
    """The best group against each other one, on the primary metric."""
    results = against_best(groups, primary_metric(groups))
    if not results:
        return ""
    if untested(results):
        said = f'<p class="empty">Not tested: {escape(str(results[0].reason))}.</p>'
        return f'<section class="card"><h3>Is the difference real?</h3>{said}</section>'
    first, metric = results[0].first, results[0].metric
    head = ["Compared with", "difference", "95 % interval", "p (t-test)", "p (Holm)", "p (sign-flip)", "n"]
    rows = [_test_row(result) for result in results]
    caption = f"{title_of(metric).capitalize()}: {first} minus each other strategy, seed by seed"
    return f'<section class="card"><h3>Is the difference real?</h3>{table(caption, head, rows)}</section>'


def _test_row(result: Comparison) -> list[str]:
    unit, d = unit_of(result.metric), result.difference
    interval = NONE if d.low is None else f"{show(d.low, unit)} to {show(d.high, unit)}"
    p_values = [show_p(p).removeprefix("p = ").replace("p &lt;", "&lt;") for p in
                (result.p_value, result.p_holm, result.p_permutation)]  # fmt: skip
    p_values = [escape(p.removeprefix("p ")) for p in p_values]
    name = escape(result.second) + (f'<span class="why">{escape(result.reason)}</span>' if result.reason else "")
    return [name, show(d.mean, unit), interval, *p_values, str(d.n)]


def all_metrics(groups: Sequence[Group]) -> str:
    """Every measured metric and cost, with its meaning."""
    runs = [run for g in groups for run in g.runs]
    tables = []
    for part, caption in (("metrics", "Metrics"), ("cost", "Cost")):
        names = [n for n in metric_names(runs, part) if any(g.values(n) for g in groups)]
        if not names:
            continue
        head = [caption[:-1] if part == "metrics" else caption, "What it says", *(escape(g.label) for g in groups)]
        rows = [[f"<b>{escape(title_of(n))}</b><code>{escape(n)}</code>", _meaning(n),
                 *(escape(show_estimate(g.estimate(n), unit_of(n))) for g in groups)] for n in names]  # fmt: skip
        tables.append(table(f"{caption}. {reading(groups)}", head, rows, words=2))
    if not tables:
        return ""
    return f'<section class="card wide"><h3>Everything measured</h3>{"".join(tables)}</section>'


def _meaning(metric: str) -> str:
    info = metric_info(metric)
    if info is None:
        return ""
    more = f"{info.formula} ({info.source})"
    source = "" if info.group == "cost" else f'<span class="source">{escape(more)}</span>'
    return f'<span class="meaning">{escape(info.summary)}{source}</span>'


def missing_table(groups: Sequence[Group]) -> str:
    """Quantities that are null, with the reason that the run gives."""
    found: dict[tuple[str, str], list[str]] = {}
    for group in groups:
        for name, reason in _missing(group).items():
            found.setdefault((name, reason), []).append(group.label)
    if not found:
        return ""
    rows = []
    for (name, reason), labels in found.items():
        where = "all" if len(labels) == len(groups) else ", ".join(labels)
        rows.append([f"<code>{escape(name)}</code>", escape(reason), *([escape(where)] if len(groups) > 1 else [])])
    head = ["Quantity", "Why it is not measured", *(["Strategy"] if len(groups) > 1 else [])]
    body = table("Quantities without a value, and the reason", head, rows, words=3)
    return f'<section class="card"><details><summary>Not measured ({len(rows)})</summary>{body}</details></section>'


def _missing(group: Group) -> dict[str, str]:
    """Name → reason of what no counted run of the group has measured."""
    found: dict[str, str] = {}
    for run in group.counted:
        reasons = {k.rsplit(".", 1)[-1]: str(v) for k, v in flat(run.get("why_null") or {}).items()}
        for part in ("metrics", "cost"):
            for name in run.get(part) or {}:
                if value_of(run, name) is None:
                    found[name] = reasons.get(name, "no reason was given")
        for name, values in (run.get("representation") or {}).items():
            if not values or all(v is None for v in values):
                found[name] = reasons.get(name, "no reason was given")
    return {name: reason for name, reason in found.items() if not group.values(name)}


def run_table(groups: Sequence[Group]) -> str:
    """One row a run: strategy, backbone, seed, status, headline metrics, folder."""
    names = headline_metrics(groups)
    head = ["Strategy", "Backbone", "Status", "Folder", "Seed", *(escape(title_of(n)) for n in names)]
    rows = []
    for group in groups:
        for run in group.runs:
            status = chip(str(run.get("status")))
            if not any(run is counted for counted in group.counted):
                status += ' <span class="why">not in the means</span>'
            folder = "/".join(Path(run["run_dir"]).parts[-2:]) if run.get("run_dir") else NONE
            values = [escape(show(value_of(run, n), unit_of(n))) for n in names]
            rows.append([escape(group.label), escape(group.backbone), status, f"<code>{escape(folder)}</code>",
                         escape(str(run.get("seed"))), *values])  # fmt: skip
    body = table("Runs", head, rows, words=4)
    is_open = " open" if len(rows) <= 6 else ""
    return f"<details{is_open}><summary>Runs ({len(rows)})</summary>{body}</details>"


def experiences_table(experiences: Sequence[dict[str, Any]], titles: Sequence[str]) -> str:
    """The stream: name, title (its classes, say), kind and sizes of each experience."""
    if not experiences:
        return ""

    def count(value: Any) -> str:
        return f"{value:,}".replace(",", " ") if isinstance(value, int) else NONE

    rows = [[escape(str(e.get("name"))), escape(title) if title != e.get("name") else NONE, escape(str(e.get("kind"))),
             count(e.get("train_samples")), count(e.get("test_samples"))]
            for e, title in zip(experiences, titles, strict=True)]  # fmt: skip
    head = ["Experience", "Of", "Kind", "training samples", "test samples"]
    if all(row[1] == NONE for row in rows):
        head, rows = [h for h in head if h != "Of"], [[row[0], *row[2:]] for row in rows]
    body = table("Experiences in order", head, rows, words=len(head) - 2)
    return f"<details><summary>Experiences ({len(rows)})</summary>{body}</details>"


def configuration(groups: Sequence[Group]) -> str:
    """What all groups share, and what sets them apart."""
    configurations = [flat((g.counted or g.runs)[0].get("config") or {}) for g in groups]
    keys = [k for k in dict.fromkeys(k for f in configurations for k in f) if k not in _NOT_SHOWN and k != "seed"]
    if not keys:
        return ""
    same = [k for k in keys if all(f.get(k, ...) == configurations[0].get(k, ...) for f in configurations)]
    apart = [k for k in keys if k not in same]
    parts = []
    if apart:
        rows = [[_code(k), *(_code(_plain(f[k])) if k in f else NONE for f in configurations)] for k in apart]
        parts.append(table("Different", ["Key", *(escape(g.label) for g in groups)], rows, words=len(groups) + 1))
    if same:
        rows = [[_code(k), _code(_plain(configurations[0][k]))] for k in same]
        parts.append(table("The same for all" if apart else "Configuration", ["Key", "Value"], rows, words=2))
    return f"<details><summary>Configuration</summary>{''.join(parts)}</details>"


def _code(text: str) -> str:
    return f"<code>{escape(text)}</code>"


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
