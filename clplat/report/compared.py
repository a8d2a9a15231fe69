"""Runs side by side for Python and notebooks: what `clplat report` says of them, as frames and HTML."""

from __future__ import annotations

import io
from collections.abc import Sequence
from html import escape
from typing import Any

from clplat.report.compare import Group
from clplat.report.numbers import show_estimate, unit_of
from clplat.report.tables import (
    comparisons_csv,
    headline_metrics,
    metrics_csv,
    plain,
    rich_comparison,
    title_of,
    tuned_texts,
)


class Compared:
    """Runs that differ only in their seed as groups, means over seeds, and tests against the best.

    Args:
        streams: groups of runs, a list for each stream: numbers of different streams do not compare.
    """

    def __init__(self, streams: Sequence[Sequence[Group]]) -> None:
        self.streams = streams

    def frame(self) -> Any:
        """A pandas DataFrame of a row for each group and metric or cost: n, mean, sd and 95 % interval, unrounded."""
        return _frame(metrics_csv(self.streams))

    def tests(self) -> Any:
        """A pandas DataFrame of the paired tests of each group against the best, for each headline metric."""
        return _frame(comparisons_csv(self.streams))

    def __repr__(self) -> str:
        return plain(rich_comparison(self.streams))

    def _repr_html_(self) -> str:
        """A table of headline metrics for each stream."""
        return "".join(map(_table, self.streams))


def _frame(text: str) -> Any:
    import pandas

    return pandas.read_csv(io.StringIO(text))


def _table(groups: Sequence[Group]) -> str:
    import pandas

    rows = {g.label: {title_of(m): show_estimate(g.estimate(m), unit_of(m)) for m in headline_metrics(groups)}
            for g in groups}  # fmt: skip
    notes = "".join(f"<p>{escape(line)}</p>" for line in tuned_texts(groups))
    return f"<p>{escape(groups[0].stream)}</p>{pandas.DataFrame.from_dict(rows, orient='index').to_html()}{notes}"
