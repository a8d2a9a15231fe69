"""The benchmarks run, and both sides of them do the same work. Nothing is asserted on times."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1]))
    from benchmarks import steps

    yield steps
    for name in [n for n in sys.modules if n.partition(".")[0] == "benchmarks"]:
        del sys.modules[name]


@pytest.mark.slow
def test_naive_trains_to_the_loss_of_the_loop_by_hand(steps: Any) -> None:
    ours, by_hand = steps.compare("mlp", "naive", seeds=1, epochs=2)
    assert ours[0].losses == pytest.approx(by_hand[0].losses, abs=1e-4)
    assert ours[0].accuracies == pytest.approx(by_hand[0].accuracies, abs=1e-6)
    times = ours[0].wall + ours[0].cpu + by_hand[0].wall + by_hand[0].cpu
    assert len(times) == 20
    assert all(math.isfinite(t) and t > 0 for t in times)


@pytest.mark.slow
def test_er_learns_as_the_loop_by_hand_does(steps: Any) -> None:
    ours, by_hand = steps.compare("mlp", "er", seeds=1, epochs=10)
    means = [sum(side[0].accuracies) / 5 for side in (ours, by_hand)]
    assert min(means) > 0.85, means
    assert abs(means[0] - means[1]) < 0.08, means


@pytest.mark.slow
def test_quick_rows_and_their_table(steps: Any) -> None:
    from benchmarks.__main__ import table

    rows = [row.to_dict() for row in steps.rows(quick=True)]
    assert [row["name"] for row in rows] == ["step, mlp, naive", "step, mlp, er"]
    assert all(0 < row["min"] <= row["median"] <= row["max"] < math.inf for row in rows)
    facts = {"date": "today", "cores": 1, "processor": "one", "load": [0.0], "python": "3", "versions": {}}
    assert table({**facts, "rows": rows}).count("\n| step, mlp") == 2


@pytest.mark.slow
def test_what_a_task_adds_to_the_state_is_what_the_formulas_say(steps: Any) -> None:
    from benchmarks import adapters

    assert {row.name: row.median for row in adapters.sizes()} == {
        f"size, {name}": 1.0 for name in ("lora", "olora", "moram", "ilora", "svd_orthogonal")
    }
    adapters.milliseconds(adapters.by_hand("attention", 2, replay=True), 1)
    adapters.milliseconds(adapters.stepping(adapters.learner("ilora", 2, memory=adapters.BATCH)), 1)


@pytest.mark.slow
def test_corruptions_by_hand_are_those_of_the_platform(steps: Any) -> None:
    """The deterministic ones agree within one grey level, which the benchmark asserts itself."""
    from benchmarks import corruptions

    rows = corruptions.rows(quick=True)
    assert len(rows) == 16
    assert all(row.passed is None for row in rows)


def test_a_figure_is_the_median_of_its_pairs(steps: Any) -> None:
    from benchmarks.timing import paired

    ratio = paired("", "ms", [2.0, 9.0, 3.0], [1.0, 3.0, 2.0], "ratio", limit=1.9)
    assert (ratio.median, min(ratio.pairs), ratio.passed) == (2.0, 1.5, False)
    difference = paired("", "s", [5.0, 4.0, 9.0], [4.0, 2.0, 4.0], "difference", limit=2.0)
    assert (difference.median, difference.passed) == (2.0, True)
    assert paired("", "s", [1.0], [1.0], "ratio").passed is None
