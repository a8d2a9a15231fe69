"""The comparison as tables: for the terminal, and as CSV, LaTeX (booktabs) and Markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from clplat.config.settings import TUNED
from clplat.report.compare import (
    FEWEST,
    HEADLINE,
    Comparison,
    Group,
    against_best,
    evaluated_on,
    higher_is_better,
    metric_names,
    split_streams,
    value_of,
)
from clplat.report.data import longest_experiences
from clplat.report.numbers import show, show_estimate, show_p, unit_of

if TYPE_CHECKING:
    from rich.table import Table

# What sums up a stream that has experiences of a kind, the most telling first.
_OF_KIND = {
    "forget": ("h_mean", "forget_accuracy", "retain_accuracy"),
    "adapt": ("online_error",),
    "interact": ("normalized_return", "initial_dip"),
}
# Of a stream of whole texts, and where a stream has sets that it does not teach.
_OF_TEXTS = ("last_perplexity", "perplexity_forgetting", "general_drop", "general_perplexity_ratio")
ALPHA = 0.05
_SHORT = {"train_seconds": "time"}
_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "±": r"$\pm$", "–": "--", "−": "$-$", "↑": r"$\uparrow$", "↓": r"$\downarrow$",
    "†": r"$^{\dagger}$", "χ": r"$\chi$", "²": r"$^2$", "≥": r"$\geq$",
})  # fmt: skip


def headline_metrics(groups: Sequence[Group]) -> list[str]:
    """Metrics that sum up a stream, by its kinds of experience; those that no run has measured are left out."""
    kinds = {e.get("kind") for e in longest_experiences(list(groups))}
    special = [of for kind, of in _OF_KIND.items() if kind in kinds]
    # A stream of many kinds gets the most telling one of each, lest the table be too wide to read.
    special_names = [name for of in special for name in (of if len(special) == 1 else of[:1])]
    names = [*HEADLINE[:-1], *special_names, *_OF_TEXTS, HEADLINE[-1]]
    measured = [name for name in names if any(group.values(name) for group in groups)]
    return measured or [HEADLINE[0]]


def primary_metric(groups: Sequence[Group]) -> str:
    """The metric that groups are tested on: of the stream's kind if it has only one besides learn, else the first."""
    kinds = {e.get("kind") for e in longest_experiences(list(groups))} - {"learn"}
    wanted = [_OF_KIND[k][0] for k in kinds if k in _OF_KIND] if len(kinds) == 1 else []
    measured = headline_metrics(groups)
    return next((name for name in wanted if name in measured), measured[0])


def title_of(metric: str) -> str:
    """A metric's name in words with an arrow towards better."""
    better = higher_is_better(metric)
    arrow = "" if better is None else " ↑" if better else " ↓"
    return _SHORT.get(metric, metric).replace("_", " ") + arrow


def best_of(groups: Sequence[Group], metric: str) -> Group | None:
    """The group with the best mean; None with fewer than two to choose from, or without a direction."""
    means = {g: m for g in groups if (m := g.estimate(metric).mean) is not None}
    better = higher_is_better(metric)
    if len(means) < 2 or better is None:
        return None
    return (max if better else min)(means, key=lambda g: means[g])


def reading(groups: Sequence[Group]) -> str:
    """What a cell of a table of these groups says."""
    most = max(len(group.counted) for group in groups)
    if most < FEWEST:
        return "Mean of two seeds, and both in brackets" if most == 2 else "Of one seed"
    return "Mean ± half the 95 % interval over seeds (Student's t)"


def seeds_text(group: Group) -> str:
    """How many runs enter the means, and how many do not: "5", "4 of 5"."""
    counted, given = len(group.counted), len(group.runs)
    return str(counted) if counted == given else f"{counted} of {given}"


def status_text(group: Group) -> str:
    """What is wrong with runs of the group: "1 failed, 2 interrupted"; empty if nothing is."""
    statuses = [str(run.get("status")) for run in group.runs]
    return ", ".join(f"{statuses.count(s)} {s}" for s in dict.fromkeys(statuses) if s != "complete")


def tuned(run: dict[str, Any]) -> str | None:
    """By which study, on which data and at what cost the run's configuration was chosen; None where by no sweep."""
    tracking = (run.get("config") or {}).get("tracking") or {}
    said = run.get(TUNED) or (tracking.get("tags") or {}).get(TUNED)
    return None if said is None else str(said)


def tuned_texts(groups: Sequence[Group]) -> list[str]:
    """A line for each group that a sweep chose the configuration of."""
    found = {g.label: dict.fromkeys(said for run in g.counted if (said := tuned(run))) for g in groups}
    return [f"{label} is tuned: {'; and '.join(said)}." for label, said in found.items() if said]


def comparison_text(result: Comparison) -> str:
    """One comparison in a line: other group, difference, interval, p-values, n."""
    unit, d = unit_of(result.metric), result.difference
    if result.p_holm is None:
        return f"{result.second}: no test ({result.reason})"
    sign = "+" if (d.mean or 0) >= 0 else ""
    interval = f" [{show(d.low, unit)}, {show(d.high, unit)}]" if d.low is not None else ""
    flips = "" if result.p_permutation is None else f", sign-flip {show_p(result.p_permutation)}"
    return f"{result.second}: {sign}{show(d.mean, unit)}{interval}, {show_p(result.p_holm)}{flips}, n = {d.n}"


def untested(results: Sequence[Comparison]) -> bool:
    """Whether no comparison could be tested, all for the same reason."""
    return len({r.reason for r in results}) == 1 and all(r.p_value is None for r in results)


def tested_text(groups: Sequence[Group]) -> str:
    """The best group against each other one on the primary metric; empty with fewer than two groups."""
    results = against_best(groups, primary_metric(groups))
    if not results:
        return ""
    metric = results[0].metric.replace("_", " ")
    if untested(results):
        return f"No paired test on {metric}: {results[0].reason}."
    head = f"Paired t-test over shared seeds on {metric} (Holm-corrected), {results[0].first} minus "
    return head + "; ".join(comparison_text(r) for r in results) + "."


def rich_comparison(streams: Sequence[Sequence[Group]]) -> Table:
    """Groups × headline metrics, a section for each stream."""
    from rich.box import SIMPLE_HEAD
    from rich.markup import escape
    from rich.table import Table
    from rich.text import Text

    names = list(dict.fromkeys(name for groups in streams for name in headline_metrics(groups)))
    notes = [reading([g for groups in streams for g in groups]) + "."]
    table = Table(
        title="Comparison" if len(streams) != 1 else f"Comparison on {escape(streams[0][0].stream)}",
        box=SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
        caption_justify="left",
        title_justify="left",
    )
    if len(streams) > 1:
        table.add_column("stream", overflow="fold")
    table.add_column("strategy", overflow="fold")
    table.add_column("seeds", justify="right", no_wrap=True)
    for name in names:
        table.add_column(title_of(name), justify="right", overflow="fold")
    for groups in streams:
        best = {name: best_of(groups, name) for name in names}
        for group in groups:
            cells = [Text(show_estimate(group.estimate(n), unit_of(n)), "bold green" if best[n] is group else "")
                     for n in names]  # fmt: skip
            stream = [escape(group.stream)] if len(streams) > 1 else []
            table.add_row(*stream, escape(group.label), seeds_text(group), *cells)
        table.add_section()
        test = tested_text(groups)
        notes += [f"{groups[0].stream}: {test}" if len(streams) > 1 else test] if test else []
        notes += [f"{g.label}: {status}." for g in groups if (status := status_text(g))] + tuned_texts(groups)
    table.caption = Text("\n".join(notes))
    return table


def console_comparison(summaries: Sequence[dict[str, Any]]) -> Table:
    """Strategies × headline metrics, mean ± half the 95 % interval over seeds, with the paired test as caption."""
    return rich_comparison(split_streams(summaries))


def plain(table: Table, width: int = 140) -> str:
    """The table as text without colours."""
    from rich.console import Console

    target = io.StringIO()
    Console(file=target, width=width, color_system=None).print(table)
    return target.getvalue()


def csv_text(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """As CSV; None is an empty cell."""
    target = io.StringIO()
    writer = csv.writer(target, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(["" if cell is None else cell for cell in row] for row in rows)
    return target.getvalue()


def marks(groups: Sequence[Group], metric: str) -> dict[str, str]:
    """What the tests against the best mean say of each group by its label: best; differs (p < 0.05, Holm); alike;
    untested. Empty where there is no best."""
    best = best_of(groups, metric)
    if best is None:
        return {}
    found = {best.label: "best"}
    for result in against_best(groups, metric):
        p = result.p_holm
        found[result.second] = "untested" if p is None else "differs" if p < ALPHA else "alike"
    return found


def metrics_csv(streams: Sequence[Sequence[Group]]) -> str:
    """One line per group and metric or cost, unrounded; `mark`, of headline metrics, as `marks` has it."""
    header = [
        "stream",
        "evaluated_on",
        "group",
        "strategy",
        "backbone",
        "metric",
        "n",
        "mean",
        "sd",
        "low_95",
        "high_95",
        "mark",
        "tuned",
    ]
    rows = []
    for groups in streams:
        marked = {name: marks(groups, name) for name in headline_metrics(groups)}
        for group in groups:
            chosen = " ".join(tuned_texts([group])) or None
            for name in metric_names(group.runs) + metric_names(group.runs, "cost"):
                e, on = group.estimate(name), evaluated_on(group.runs[0])
                mark = marked.get(name, {}).get(group.label)
                rows.append([group.stream, on, group.label, group.strategy, group.backbone, name,
                             e.n, e.mean, e.sd, e.low, e.high, mark, chosen])  # fmt: skip
    return csv_text(header, rows)


def runs_csv(streams: Sequence[Sequence[Group]]) -> str:
    """One line per run, all metrics and costs as columns, unrounded."""
    runs = [(g, run) for groups in streams for g in groups for run in g.runs]
    names = metric_names([r for _, r in runs]) + metric_names([r for _, r in runs], "cost")
    header = ["stream", "evaluated_on", "group", "strategy", "backbone", "seed", "status", "counted", "run_dir", TUNED,
              *names]  # fmt: skip
    rows = []
    for g, r in runs:
        counted = any(r is c for c in g.counted)
        facts = [g.stream, evaluated_on(r), g.label, g.strategy, g.backbone, r.get("seed"), r.get("status"), counted]
        rows.append([*facts, r.get("run_dir"), tuned(r), *(value_of(r, n) for n in names)])
    return csv_text(header, rows)


def comparisons_csv(streams: Sequence[Sequence[Group]]) -> str:
    """One line per paired comparison with the best group, for each headline metric."""
    header = ["stream", "metric", "first", "second", "n", "difference", "low_95", "high_95", "p_t", "p_t_holm",
              "p_sign_flip", "reason"]  # fmt: skip
    rows = []
    for groups in streams:
        for result in (r for name in headline_metrics(groups) for r in against_best(groups, name)):
            d = result.difference
            rows.append([groups[0].stream, result.metric, result.first, result.second, d.n, d.mean, d.low, d.high,
                         result.p_value, result.p_holm, result.p_permutation, result.reason])  # fmt: skip
    return csv_text(header, rows)


def latex(groups: Sequence[Group]) -> str:
    """Groups × headline metrics of one stream; the best mean in bold, a dagger at those that differ from it."""
    names = headline_metrics(groups)
    marked = {name: marks(groups, name) for name in names}
    said = {mark for own in marked.values() for mark in own.values()}

    def cell(group: Group, name: str) -> str:
        text, mark = show_estimate(group.estimate(name), unit_of(name)), marked[name].get(group.label)
        return f"**{text}**" if mark == "best" else f"{text}†" if mark == "differs" else text

    first = reading(groups)
    caption = f"{groups[0].stream}: {first[0].lower()}{first[1:]}."
    caption += " Bold: the best mean." if "best" in said else ""
    if said & {"differs", "alike"}:
        caption += " †: differs from it (paired t-test over shared seeds, Holm-corrected, p < 0.05)."
    elif "untested" in said:
        caption += f" Not tested: {against_best(groups, primary_metric(groups))[0].reason}."
    caption = " ".join([caption, *tuned_texts(groups)])
    head = ["Strategy", "Seeds", *map(title_of, names)]
    return latex_text(caption, head, [[g.label, seeds_text(g), *(cell(g, n) for n in names)] for g in groups])


def latex_text(caption: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A LaTeX table in booktabs rules; a cell between pairs of stars is bold."""

    def told(cell: str) -> str:
        bold = len(cell) > 4 and cell.startswith("**") and cell.endswith("**")
        text = (cell[2:-2] if bold else cell).translate(_LATEX)
        return rf"\textbf{{{text}}}" if bold else text

    lines = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}",
        rf"  \caption{{{caption.translate(_LATEX)}}}",
        rf"  \begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
        r"    \toprule",
        "    " + " & ".join(map(told, head)) + r" \\",
        r"    \midrule",
        *("    " + " & ".join(map(told, row)) + r" \\" for row in rows),
        r"    \bottomrule",
        r"  \end{tabular}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def markdown(groups: Sequence[Group]) -> str:
    """Groups × headline metrics of one stream as a Markdown table; the best mean in bold."""
    names = headline_metrics(groups)
    best = {name: best_of(groups, name) for name in names}

    def cell(group: Group, name: str) -> str:
        text = show_estimate(group.estimate(name), unit_of(name))
        return f"**{text}**" if best[name] is group else text

    rows = [["strategy", "seeds", *map(title_of, names)], ["---", *["---:"] * (len(names) + 1)]]
    rows += [[_escaped(g.label), seeds_text(g), *(cell(g, n) for n in names)] for g in groups]
    note = "Figures of validation data.\n\n" if evaluated_on(groups[0].runs[0]) == "valid" else ""
    chosen = "".join(f"\n{_escaped(line)}\n" for line in tuned_texts(groups))
    return note + "\n".join("| " + " | ".join(row) + " |" for row in rows) + "\n" + chosen


def _escaped(text: str) -> str:
    return text.replace("|", r"\|").replace("<", "&lt;").replace("\n", " ")
