"""What a run gives back to its caller."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
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
