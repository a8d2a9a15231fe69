"""`clplat.compare`: frames and HTML of runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import clplat
from clplat.errors import UserError


def test_runs_side_by_side(tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "stream": {"name": "digits", "train_per_class": 20, "test_per_class": 8}, "backbone": "mlp",
        "tracking": {"enabled": False}, "loop": {"max_steps": 1}, "output": str(tmp_path),
    }  # fmt: skip
    naive, er = (clplat.run(given, strategy=s, seeds=[0, 1], quiet=True) for s in ("naive", "er"))
    compared = clplat.compare([*naive, *(r.run_dir for r in er)])
    frame = compared.frame().set_index(["group", "metric"])
    for name, results in (("naive", naive), ("er", er)):
        mean = sum(r.metrics["average_accuracy"] for r in results) / 2
        assert frame.loc[(name, "average_accuracy"), "mean"] == pytest.approx(mean)
        assert frame.loc[(name, "average_accuracy"), "n"] == 2
    assert {"first", "second", "p_t", "reason"} <= set(compared.tests().columns)
    assert "<table" in compared._repr_html_()
    assert all(name in compared._repr_html_() and name in repr(compared) for name in ("naive", "er"))


def test_no_runs_are_refused() -> None:
    with pytest.raises(UserError, match="compare: name runs"):
        clplat.compare([])
