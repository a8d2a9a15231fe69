"""The loop over faults: losses, outputs and weights that are no numbers, memory that ends, a stop on request."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from clplat.errors import DivergedError, Interrupted, OutOfMemory
from clplat.run import checkpoint
from clplat.run.saving import restore, snapshot


def test_nan_loss_stops_and_names_the_step(tmp_path: Path, make_runner: Any) -> None:
    runner = make_runner(tmp_path, **{"loop.checkpoint_every": 1})
    hook = runner.strategy.training_step

    def poisoned(batch: Any, index: int) -> Any:
        loss = hook(batch, index)
        return loss * float("nan") if runner.progress.experience == 1 and runner.progress.steps == 6 else loss

    object.__setattr__(runner.strategy, "training_step", poisoned)
    with pytest.raises(DivergedError, match=r"loss is nan in experience 1 \(second\) at step 7"):
        runner.run()
    state, _ = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    assert state["progress"]["steps"] == 6  # the last good state
    assert all(v.isfinite().all() for v in state["strategy"].values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize("stop", [3, 12, 21])
def test_a_stop_on_request_leaves_no_line_that_a_run_without_it_has_not(
    make_runner: Any, tmp_path: Path, stop: int
) -> None:
    options = {"loop.eval_every": None, "loop.stop_after": 3}
    (tmp_path / "whole").mkdir()
    (tmp_path / "cut").mkdir()
    make_runner(tmp_path / "whole", **options).run()
    runner = make_runner(tmp_path / "cut", **options)
    after_step = runner.strategy.after_step
    asked = lambda: setattr(runner, "stop_requested", runner.progress.total_steps == stop)  # noqa: E731
    object.__setattr__(runner.strategy, "after_step", lambda: (after_step(), asked()))
    with pytest.raises(Interrupted):
        runner.run()
    state, _ = checkpoint.load_newest(tmp_path / "cut" / "checkpoints")
    assert state is not None
    second = make_runner(tmp_path / "cut", offset=state["metrics_offset"], **options)
    restore(second, state)
    second.run()

    def lines(name: str) -> list[Any]:
        rows = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [
            (r["axis"], r["step"], {k: v for k, v in r["metrics"].items() if "seconds" not in k and "cost" not in k})
            for r in rows
        ]

    assert lines("cut") == lines("whole")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried 8 bytes"),
        MemoryError(),
    ],
)
def test_no_memory_left_is_one_line_and_can_be_gone_on_with(make_runner: Any, tmp_path: Path, error: Exception) -> None:
    runner = make_runner(tmp_path, **{"loop.checkpoint_every": 2})
    hook = runner.strategy.training_step

    def greedy(batch: Any, index: int) -> Any:
        if runner.progress.total_steps == 5:
            raise error
        return hook(batch, index)

    object.__setattr__(runner.strategy, "training_step", greedy)
    with pytest.raises(OutOfMemory, match=r"in experience 0 \(first\) at step 5: lower loop\.batch_size"):
        runner.run()
    state, _ = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    assert state["progress"]["steps"] == 4


def test_another_error_of_a_step_is_not_taken_for_it(make_runner: Any) -> None:
    runner = make_runner()

    def broken(batch: Any, index: int) -> Any:
        raise RuntimeError("shapes do not fit")

    object.__setattr__(runner.strategy, "training_step", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        runner.run()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("experience", "hook"), [(0, "after_step"), (1, "end"), (2, "after_step"), (3, "adapt_step")])
def test_outputs_that_are_not_finite_fail_the_run(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch, value: float, experience: int, hook: str
) -> None:
    """After learning, after `end`, after forgetting, and while adapting; where the loss itself is finite."""
    runner = make_runner(**{"loop.eval_every": None})
    original = getattr(type(runner.strategy), hook)

    def broken(*args: Any) -> Any:
        found = original(*args)
        if runner.progress.experience != experience:
            return found
        if hook == "adapt_step":
            return (found[0] * value, found[1]) if isinstance(found, tuple) else found * value
        with torch.no_grad():
            list(runner.strategy.model.parameters())[-1].fill_(value)
        return found

    monkeypatch.setattr(type(runner.strategy), hook, broken)
    with pytest.raises(DivergedError, match=rf"in experience {experience} .* at step \d+"):
        runner.run()
    assert len(runner.record.matrix) == experience + 1  # no row was made of them


def test_weights_that_are_not_finite_are_named_before_anything_is_trained(make_runner: Any) -> None:
    runner = make_runner(head="linear")
    with torch.no_grad():
        next(runner.strategy.model.parameters()).fill_(float("nan"))
    with pytest.raises(DivergedError, match=r"for 200 of 200 test samples before experience 0 \(first\)"):
        runner.run()


@pytest.mark.parametrize("stop", [None, 25])
def test_a_sample_is_offered_to_a_memory_once_however_often_it_is_trained_on(
    make_runner: Any, stop: int | None
) -> None:
    """160 samples in three epochs each; also where a run is gone on with in its second epoch."""
    options = {"strategy.memory": 150, "loop.max_epochs": 3, "loop.stop_after": 2, "loop.eval_every": None}
    runner = make_runner(**options)
    if stop is not None:
        runner.strategy.after_step = lambda: setattr(runner, "stop_requested", runner.progress.total_steps == stop)
        with pytest.raises(Interrupted):
            runner.run()
        state, runner = snapshot(runner), make_runner(**options)
        restore(runner, state)
    runner.run()
    memory = runner.strategy.memory
    assert len(memory) == memory.size == 150
    assert len(memory.data().inputs.unique(dim=0)) == 150
    assert memory.seen == 160
    assert memory.open
