"""The benchmarks run, and both sides of them do the same work. Nothing is asserted on times."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def steps(benchmarks: None) -> Any:
    from benchmarks import steps

    return steps


@pytest.fixture
def benchmarks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.syspath_prepend(str(ROOT))
    yield
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_part_for_a_gpu_runs_on_the_cpu_and_is_in_the_file(tmp_path: Path) -> None:
    """All but the card: each test that is marked `gpu`, and tiny models of each benchmark with equal losses."""
    path = tmp_path / "there" / "found.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--device", "cpu", "--small", "--seconds", "2400"]
    done = subprocess.run([*command, "--output", str(path)], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"})
    found = json.loads(path.read_text())
    parts = {part["part"]: part for part in found["parts"]}
    assert [(p["status"], p.get("why")) for p in parts.values()] == [("done", None)] * 7
    assert done.returncode == 0
    assert list(parts) == ["tests", "vit", "resnet", "llama", "cotta", "acu", "compile"]
    assert (found["device"]["type"], found["small"], bool(found["device"]["name"])) == ("cpu", True, True)
    assert 0 < sum(part["seconds"] for part in parts.values()) <= found["seconds"]
    cases = parts.pop("tests")["rows"]
    assert {case["outcome"] for case in cases} == {"passed"}
    kinds = {case["name"].partition("[")[2].rstrip("]") for case in cases}
    assert {"learn", "forget", "adapt", "interact"} <= kinds
    for part in parts.values():
        for row in part["rows"]:
            assert 0 < row["min"] <= row["median"] <= row["max"] < math.inf
            if "difference in loss" in row["note"]:
                assert float(row["note"].rpartition(" ")[2]) < 1e-2, row  # bf16 has 8 bits of mantissa
    assert [len(part["rows"]) for part in parts.values()] == [2, 2, 1, 1, 2, 1]


class Script:
    """A worker that sends what it is told, and dies or says no more where it is told so."""

    def __init__(self, messages: list[Any]) -> None:
        self.messages, self.ended = messages, False

    def get(self, seconds: float) -> Any:
        message = self.messages.pop(0)
        if message == "dies":
            raise EOFError
        return message

    def end(self) -> None:
        self.ended = True


def test_a_part_that_is_late_or_dies_keeps_its_figures_and_the_rest_is_measured(benchmarks: None) -> None:
    from benchmarks.gpu import gather, good

    scripts = [
        Script([("a", "row", {"x": 1}), ("a", "end", None), ("b", "row", {"x": 2}), None]),
        Script([("c", "row", {"x": 3}), "dies"]),
        Script([("d", "end", "ValueError: no"), ("e", "row", {"x": 4}), ("e", "end", None)]),
    ]
    started, waiting = [], list(scripts)

    def start(names: list[str]) -> Any:
        started.append(names)
        return waiting.pop(0)

    clock = iter(range(1000))
    found = gather(start, dict.fromkeys("abcdef", 5.0), 26.0, lambda: float(next(clock)))
    assert started == [list("abcdef"), list("cdef"), list("def")]
    assert [script.ended for script in scripts] == [True] * 3
    assert [(p["part"], p["status"], [r["x"] for r in p["rows"]]) for p in found] == [
        ("a", "done", [1]), ("b", "out of time", [2]), ("c", "failed", [3]), ("d", "failed", []), ("e", "done", [4]),
        ("f", "not reached", []),
    ]  # fmt: skip
    whys = [part.get("why") for part in found]
    assert whys[2:] == ["its process died", "ValueError: no", None, "the whole has 26 s"]
    assert not good(found)
    assert good(found[:1])
    assert not good([{**found[0], "rows": [{"passed": False}]}])
    assert not good([{**found[0], "rows": [{"outcome": "failure"}]}])


def test_no_time_is_given_beyond_the_whole(benchmarks: None) -> None:
    """A part gets what is left where that is less than its own."""
    from benchmarks.gpu import gather

    given = []

    class Slow(Script):
        def get(self, seconds: float) -> Any:
            given.append(seconds)
            return super().get(seconds)

    gather(lambda names: Slow([("a", "end", None), None]), {"a": 5.0, "b": 50.0}, 7.0, lambda: 0.0)
    assert given == [5.0, 7.0]


def test_without_a_gpu_one_line_says_so(
    benchmarks: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from benchmarks import gpu

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(gpu, "gather", None)
    assert gpu.main([]) == 0
    assert capsys.readouterr().out.startswith("no GPU: ")


@pytest.mark.slow
def test_real_models_by_hand_take_the_steps_of_the_platform(benchmarks: None) -> None:
    """Small ones: from the same weights on the same batches, so that losses are equal but for rounding."""
    from benchmarks import processes, real, smollm2

    rows = processes.rows(quick=True) + real.rows(quick=True) + smollm2.rows(quick=True)
    steps = [f"step, {m}, {s}" for m in ("vit_tiny", "minilm", "smollm2") for s in ("naive", "er", "lora")]
    steps += ["step, efficientnet, naive", "step, efficientnet, er", "step, vit_tiny, naive, two processes"]
    scored = ["evaluation, a sample, minilm", "evaluation, a sample, efficientnet", "label scoring, a sample, smollm2"]
    assert sorted(row.name for row in rows) == sorted([*steps, *scored])
    for row in rows:
        if row.name in scored:
            ours, by_hand = row.note.rpartition("accuracy ")[2].split(" and ")
            assert ours == by_hand, row
        elif not row.name.endswith("er"):  # whose replays are drawn by each side
            assert float(row.note.rpartition(" ")[2]) < 1e-5, row


@pytest.mark.slow
def test_strategies_by_hand_end_with_the_losses_of_the_platform(benchmarks: None) -> None:
    """Those that draw no samples: a pass, a penalty or an importance that one side left out would tell."""
    from benchmarks import arithmetic

    rows = {row.name.split(", ")[1]: row for row in arithmetic.rows(quick=True)}
    assert list(rows) == list(arithmetic.LOOPS)
    for name, row in rows.items():
        assert 0 < min(row.pairs) <= row.median < math.inf
        if name not in arithmetic.REPLAYS:
            assert float(row.note.rpartition(" ")[2]) < 1e-5, row


@pytest.mark.slow
def test_strategies_in_the_barest_loop_end_with_the_losses_of_the_platform(benchmarks: None) -> None:
    from benchmarks import overhead

    (row,) = overhead.rows(quick=True)
    assert len(row.pairs) == 3
    assert 0 < min(row.pairs) <= row.median < math.inf
    assert row.note.endswith("differences in loss: none")


@pytest.mark.slow
def test_a_longer_stream_next_to_a_short_one(benchmarks: None) -> None:
    from benchmarks import long_streams

    rows = long_streams.rows(quick=True)
    assert [row.name.partition(",")[0] for row in rows] == [
        "time of an experience", "folder of an experience", "report.html of an experience", "peak memory",
    ]  # fmt: skip
    assert all(0 < row.ours < math.inf and 0 < row.base < math.inf for row in rows)
