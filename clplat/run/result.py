"""What a run gives back to its caller."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

# What is shown of a run, as far as it was measured: the first of these.
_SHOWN = ("average_accuracy", "forgetting", "forget_accuracy", "retain_accuracy", "online_error", "normalized_return")


@dataclass(frozen=True, repr=False)
class Result:
    """What a run left behind.

    Args:
        run_dir: its folder.
        summary: contents of summary.json.
        note: one line for the user, such as measurements that could not be sent yet.
    """

    run_dir: Path
    summary: dict[str, Any]
    note: str | None = None

    @property
    def status(self) -> str:
        """complete, interrupted or failed."""
        return self.summary["status"]

    @property
    def metrics(self) -> dict[str, float | None]:
        """Metrics by name; None where not measured."""
        return self.summary["metrics"]

    @property
    def accuracy_matrix(self) -> list[list[float | None]]:
        """Row i after i experiences, column j test set j."""
        return self.summary["accuracy_matrix"]

    def frame(self) -> Any:
        """The accuracy matrix as a pandas DataFrame: a row before and after each experience, a column a test set."""
        import pandas

        names = [e["name"] for e in self.summary["experiences"]]
        rows = ["before", *names][: len(self.accuracy_matrix)]
        return pandas.DataFrame(self.accuracy_matrix, index=rows, columns=names, dtype=float)

    def __repr__(self) -> str:
        if not self.summary:  # of a process that is not the first
            return f"Result({self.run_dir})"
        s, shown = self.summary, {k: self.metrics.get(k) for k in _SHOWN}
        figures = ", ".join(f"{k} {v:.3f}" for k, v in shown.items() if v is not None) or "nothing measured"
        return f"Result({s['strategy']} on {s['stream']}, seed {s['seed']}, {s['status']}: {figures}; {self.run_dir})"

    def _repr_html_(self) -> str:
        """Its line, and the accuracy matrix."""
        if not self.summary:
            return escape(repr(self))
        return f"<p>{escape(repr(self))}</p>{self.frame().to_html(float_format='{:.3f}'.format, na_rep='')}"


class Results(list[Result]):
    """What several runs left behind, in order."""

    def frame(self) -> Any:
        """A pandas DataFrame of a row for each run: what it was, and its metrics."""
        import pandas

        facts = ("name", "strategy", "stream", "backbone", "seed", "status")
        rows = [{**{k: r.summary[k] for k in facts}, **r.metrics, "run_dir": str(r.run_dir)} for r in self]
        return pandas.DataFrame(rows)

    def __repr__(self) -> str:
        return "\n".join(map(repr, self))

    def _repr_html_(self) -> str:
        return self.frame().dropna(axis=1, how="all").to_html(float_format="{:.3f}".format, index=False)
