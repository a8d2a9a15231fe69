"""The leaderboard: its page and configurations are those of the results beside them."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent.parent / "experiments" / "field"
_spec = importlib.util.spec_from_file_location("field_rows", HERE / "rows.py")
assert _spec is not None
assert _spec.loader is not None
rows = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = rows
_spec.loader.exec_module(rows)


def results(stream: str, **accuracies: list[float]) -> dict:
    """Strategies, each with its average accuracy under seeds 0, 1, ..."""
    runs = [
        {
            "name": f"field-{stream}/{name}", "strategy": name, "seed": seed, "config": {},
            "metrics": {"average_accuracy": value}, "cost": {"train_seconds": float(len(name)), "stored_bytes": 0},
        }
        for name, values in accuracies.items()
        for seed, value in enumerate(values)
    ]  # fmt: skip
    options = {name: {"options": {"name": name, "memory": 500, "lr": 0.125}} for name in accuracies}
    return {"experiment": f"field/{stream}", "rows": options, "runs": runs}


def test_the_page_shows_the_results() -> None:
    text = (HERE / "README.md").read_text(encoding="utf-8")
    found = dict(re.findall(r"<!-- generated: (\S+) -->\n\n(.*?)\n\n<!-- end: \1 -->", text, re.DOTALL))
    assert found == rows.parts_of(rows.results_here())


def test_configurations_have_an_arm_for_each_row() -> None:
    known = rows.results_here()
    assert known
    for stream, one in known.items():
        assert (HERE / f"{stream}.yaml").read_text(encoding="utf-8") == rows.configuration(stream, one)
        assert one["rows"].keys() == {run["strategy"] for run in one["runs"]}


def test_what_is_not_tuned_is_not_searched() -> None:
    fixed, space = rows.fixed_and_space("corruptions", "eata")
    assert fixed == {"fisher_weight": 0.0}
    assert space.keys() == {"strategy.adapt_lr", "strategy.margin", "strategy.redundancy"}
    assert space["strategy.adapt_lr"] == {"low": 1e-5, "high": 0.1, "log": True}
    assert rows.fixed_and_space("cifar100", "simplecil") == ({}, {})
    of_requests = {name: rows.fixed_and_space("requests", name)[1] for name in ("random_labels", "grad_diff", "ssd")}
    assert {name: "strategy.lr" in space for name, space in of_requests.items()} == {
        "random_labels": True, "grad_diff": False, "ssd": False,
    }  # fmt: skip


def test_strategies_that_are_not_told_apart_are_named() -> None:
    near = results("cifar100", acil=[0.5, 0.6, 0.7], er=[0.52, 0.57, 0.69], naive=[0.1, 0.2, 0.3])
    said = rows.answer("cifar100", near)
    assert "`acil` has the best mean" in said
    assert "beyond the interval: `er`." in said
    assert "The cheapest of these to train is `er`." in said
    first, second, third = rows.table("cifar100", near).splitlines()[2:]
    assert first.startswith("| 1 | `acil` | 0.600 ± 0.248 |")
    assert "| lr 0.12 |" in first  # memory is the same for all
    assert second.startswith("| 2 | `er` |")
    assert "| 0.400 ± 0.000 |" in third


def test_ranks_are_over_streams_that_are_learned() -> None:
    both = {s: results(s, acil=[0.5, 0.6, 0.7], er=[0.4, 0.5, 0.6]) for s in ("cifar100", "text")}
    assert "| `acil` | 1.0 | 1 | 1 |" in rows.overall(both)
    assert rows.overall({"cifar100": both["cifar100"]}).startswith("Not ranked")


@pytest.mark.parametrize("stream", list(rows.STREAMS))
def test_a_row_is_repeated_by_its_name(stream: str) -> None:
    text = rows.configuration(stream, results(stream, er=[0.5, 0.5, 0.5]))
    assert text.endswith("runs:\n  er: {strategy: {name: er, memory: 500, lr: 0.125}}\n")
    assert "sweep:" not in text
