"""Figures of adapting at test time: error by what the data come from, and by round."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from clplat.report.compare import Estimate, Group, estimate
from clplat.report.data import FRACTION, series
from clplat.report.numbers import show
from clplat.report.spec import Figure, Heat, Lines, Panel


def figures(groups: list[Group]) -> list[Figure | None]:
    """What there is to draw of the groups of one stream; None where they have no data for a figure."""
    return [_by_domain(groups), _by_round(groups), _by_round_and_domain(groups)]


def _tables(group: Group) -> list[dict[str, Any]]:
    """`adaptation` of the summaries that count, where there is one."""
    return [table for run in group.counted if (table := run.get("adaptation"))]


def _cells(
    group: Group, domains: list[str], chosen: Callable[[dict[str, Any]], bool] = lambda _: True
) -> list[Estimate]:
    """Error under each domain over the seeds, from those segments that are chosen."""

    def error(table: dict[str, Any], domain: str) -> float | None:
        found = [s["error"] for s in table["segments"] if s["domain"] == domain and chosen(s)]
        return sum(found) / len(found) if found else None

    return [estimate([error(table, domain) for table in _tables(group)], FRACTION) for domain in domains]


def _domains(groups: list[Group]) -> list[str]:
    """In the order met, by the run that has met most."""
    tables = [table for group in groups for table in _tables(group)]
    return max((list(table["error_by_domain"]) for table in tables), key=len, default=[])


def _rounds(groups: list[Group]) -> int:
    return max((len(table["error_by_round"]) for group in groups for table in _tables(group)), default=0)


def _plain(name: str) -> str:
    return name.replace("_", " ")


def _by_domain(groups: list[Group]) -> Figure | None:
    domains, shown = _domains(groups), [g for g in groups if _tables(g)]
    if len(domains) < 2:
        return None
    title = "Online error under each corruption"
    values = [_cells(g, domains) for g in shown]
    means = [c.mean for row in values for c in row if c.mean is not None]
    heat = Heat(title, None, [g.label for g in shown], [_plain(d) for d in domains], values, accuracy=False)
    caption = (
        "Error of predictions made as the data arrive, before adapting to them; dark is wrong. Mean over rounds, "
        "severities and seeds."
    )
    alt = f"Heat map, a row a strategy, {len(domains)} columns; errors from {show(min(means))} to {show(max(means))}."
    return Figure("online-error-by-corruption", title, caption, alt, [heat])


def _by_round(groups: list[Group]) -> Figure | None:
    if _rounds(groups) < 2:
        return None
    lines = []
    for index, group in enumerate(groups):
        lists = [table["error_by_round"] for table in _tables(group)]
        length = max(map(len, lists), default=0)
        rounds = [[errors[r] if r < len(errors) else None for errors in lists] for r in range(length)]
        values = [estimate(own, FRACTION) for own in rounds]
        line = series(index, group.label, [float(r + 1) for r in range(length)], values)
        lines += [line] if line is not None else []
    title = "Online error in each round"
    caption = (
        "Mean error over the corruptions of a round. A line that rises: adapting does harm that lasts. Bands: 95 % "
        "interval over seeds; of two, thin lines, one a seed."
    )
    alt = "Error over rounds: " + "; ".join(f"{s.label} ends at {show(s.y[-1])}" for s in lines) + "."
    return Figure("online-error-by-round", title, caption, alt, [Lines(title, "round", "online error", lines)])


def _by_round_and_domain(groups: list[Group]) -> Figure | None:
    domains, rounds = _domains(groups), _rounds(groups)
    if rounds < 2 or len(domains) < 2:
        return None
    panels: list[Panel] = []
    for index, group in enumerate(groups):
        if _tables(group):
            values = [_cells(group, domains, lambda s, r=r: s["round"] == r) for r in range(rounds)]  # type: ignore[misc]
            rows = [f"round {r + 1}" for r in range(rounds)]
            panels.append(Heat(group.label, index, rows, [_plain(d) for d in domains], values, accuracy=False))
    caption = "Error of predictions made as the data arrive, by round and corruption; dark is wrong. Mean over seeds."
    alt = "Heat maps of errors, a row a round, one for each strategy: " + ", ".join(p.title for p in panels) + "."
    return Figure("online-error-by-round-and-corruption", "Online error, round by round", caption, alt, panels)
