"""Checkpoints written while the run goes on: consistent, one at a time, whole when it is over, loud when they fail."""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed import mixed_config

import clplat
from clplat.errors import DivergedError, Interrupted, UserError
from clplat.run import checkpoint, saving
from clplat.run.loop import Runner
from clplat.run.saving import due, restore
from clplat.run.writer import Writer

WAIT = 30  # seconds after which a test gives up


def test_an_error_of_a_job_is_raised_by_the_next_call_and_once() -> None:
    writer = Writer()

    def job() -> None:
        raise UserError("no room")

    for call in (writer.wait, lambda: writer.start(print), writer.check):
        writer.start(job)
        while writer.busy:
            time.sleep(0.001)
        with pytest.raises(UserError, match="no room"):
            call()
        writer.wait()


def test_there_are_never_two_at_once() -> None:
    writer, under_way, most = Writer(), [0], [0]

    def job() -> None:
        under_way[0] += 1
        most[0] = max(most[0], under_way[0])
        time.sleep(0.02)
        under_way[0] -= 1

    for _ in range(5):
        writer.start(job)
    writer.wait()
    assert most == [1]
    assert not writer.busy


def test_an_error_beside_another_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    writer = Writer()

    def job() -> None:
        raise UserError("no room")

    writer.start(job)
    writer.finish()
    assert capsys.readouterr().err == "clplat: no room\n"


def outcome(runner: Runner) -> dict[str, Any]:
    record = runner.record.to_dict()
    del record["cost"]
    for event in record["ledger"]:
        del event["started"], event["finished"], event["seconds"]
    return {"record": record} | {
        name: value.tolist() for name, value in runner.strategy.state_dict().items() if isinstance(value, torch.Tensor)
    }


def after_each_step(runner: Runner, then: Callable[[int], None]) -> None:
    """Have `then` called with the number of each step taken, before anything is saved."""
    update = runner._update

    def both(loss: Any) -> None:
        update(loss)
        then(runner.progress.total_steps)

    runner._update = both


def test_the_run_goes_on_and_what_is_written_is_of_the_moment_it_was_taken(
    tmp_path: Path, make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first checkpoint is held back until twelve more steps were taken: a loop that waited would never get there.
    A run that goes on from it, and from the log as it was then, ends as the one that was not stopped."""
    (tmp_path / "straight").mkdir()
    straight = make_runner(tmp_path / "straight")
    straight.run()
    (tmp_path / "run").mkdir()
    runner, far, write, late = make_runner(tmp_path / "run"), threading.Event(), checkpoint.write, list[bool]()

    def stopping(step: int) -> None:
        if step == 5:
            runner.save()
        if step == 17:
            far.set()
            raise KeyboardInterrupt

    def held_back(*arguments: Any) -> Path:
        late.append(far.wait(WAIT))
        return write(*arguments)

    after_each_step(runner, stopping)
    monkeypatch.setattr(checkpoint, "write", held_back)
    with pytest.raises(KeyboardInterrupt):
        runner.run()
    assert late == [True]
    state, notes = checkpoint.load_newest(tmp_path / "run" / "checkpoints")
    assert state is not None
    assert not notes
    assert state["progress"]["total_steps"] == 5
    second = make_runner(tmp_path / "run", state["metrics_offset"])
    restore(second, state)
    second.run()
    assert outcome(second) == outcome(straight)

    def log(name: str) -> list[Any]:
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return [(r["axis"], r["step"]) for r in rows]

    assert log("run") == log("straight")


def slowly(monkeypatch: pytest.MonkeyPatch, seconds: float = 0.3) -> list[Path]:
    """Make each checkpoint take so long; gives those written."""
    write, made = checkpoint.write, list[Path]()

    def slow(*arguments: Any) -> Path:
        time.sleep(seconds)
        made.append(write(*arguments))
        return made[-1]

    monkeypatch.setattr(checkpoint, "write", slow)
    return made


def test_the_last_checkpoint_is_whole_when_the_run_returns(
    tmp_path: Path, make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    slowly(monkeypatch)
    runner = make_runner(tmp_path, **{"loop.stop_after": 1})
    runner.run()
    assert not runner.writer.busy
    state, _ = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    assert state["progress"]["experience"] == 1


@pytest.mark.parametrize("kind", [Interrupted, DivergedError, KeyboardInterrupt])
def test_a_run_that_ends_early_leaves_no_writing_behind(
    tmp_path: Path, make_runner: Any, monkeypatch: pytest.MonkeyPatch, kind: type[BaseException]
) -> None:
    slowly(monkeypatch)
    runner = make_runner(tmp_path)

    def ending(step: int) -> None:
        if step == 3:
            runner.save()
        if step == 4:
            runner.stop_requested = kind is Interrupted
            if kind is not Interrupted:
                raise kind("so it ends")

    after_each_step(runner, ending)
    with pytest.raises(kind):
        runner.run()
    assert not runner.writer.busy
    state, _ = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    assert state["progress"]["total_steps"] == (4 if kind is Interrupted else 3)


@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_checkpoint_that_fails_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The first one, in the midst of it, or the last one, after which nothing else is done."""
    write = checkpoint.write

    def full(folder: Path, step: int, taken: Any) -> Path:
        if step == number:
            raise UserError("output: could not write it; the run can be resumed")
        return write(folder, step, taken)

    monkeypatch.setattr(checkpoint, "write", full)
    with pytest.raises(UserError, match="could not write it"):
        clplat.run(mixed_config(tmp_path), quiet=True, **{"loop.stop_after": 2})
    (run_dir,) = (tmp_path / "mixed").iterdir()
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "failed"


def test_a_stop_whose_checkpoint_fails_does_not_claim_that_it_was_written(
    make_runner: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: Any) -> Path:
        raise UserError("output: could not write it")

    monkeypatch.setattr(checkpoint, "write", full)
    runner = make_runner(tmp_path)
    after_each_step(runner, lambda step: setattr(runner, "stop_requested", True))
    with pytest.raises(UserError, match="could not write it"):
        runner.run()


def test_an_interval_in_steps_is_kept_to_the_step(
    tmp_path: Path, make_runner: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = slowly(monkeypatch, 0.02)
    runner = make_runner(tmp_path, **{"loop.checkpoint_every": 5, "loop.stop_after": 1})
    original = runner.strategy.after_step
    counted: list[tuple[int, int]] = []
    note = lambda: counted.append((runner.progress.total_steps - 1, len(made)))  # noqa: E731 - before this step
    object.__setattr__(runner.strategy, "after_step", lambda: (original(), note()))
    runner.run()
    assert [n for _, n in counted] == [steps // 5 for steps, _ in counted]


# --- the order in which things reach the disk -------------------------------------------------------------------------


def test_everything_is_on_the_disk_before_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Content, then its name, then the folder's entries, each flushed before the next; the old ones go last."""
    events, folder = list[tuple[str, str]](), tmp_path / "checkpoints"
    for number in range(checkpoint.KEEP):
        checkpoint.save(folder, number, {"value": torch.ones(3)})
    fsync, replace, rename, rmtree = os.fsync, os.replace, Path.rename, checkpoint.shutil.rmtree

    def short(path: Any) -> str:
        return ".".join(part for part in Path(path).name.split(".") if part and part != str(os.getpid()))

    def noted(name: str, path: Any) -> None:
        events.append((name, short(path)))

    def removed(path: Path, **how: Any) -> None:
        if path.exists():
            noted("remove", path)
        rmtree(path, **how)

    monkeypatch.setattr(os, "fsync", lambda h: (noted("fsync", os.readlink(f"/proc/self/fd/{h}")), fsync(h)))
    monkeypatch.setattr(os, "replace", lambda a, b: (noted("name", b), replace(a, b)))
    monkeypatch.setattr(Path, "rename", lambda a, b: (noted("name", b), rename(a, b))[1])
    monkeypatch.setattr(checkpoint.shutil, "rmtree", removed)
    checkpoint.save(folder, 7, {"value": torch.ones(3)})
    assert events == [
        ("fsync", "tensors.safetensors.part"), ("name", "tensors.safetensors"), ("fsync", "0000000007.part"),
        ("fsync", "state.json.part"), ("name", "state.json"), ("fsync", "0000000007.part"),
        ("name", "0000000007"), ("fsync", "checkpoints"), ("remove", "0000000000"),
    ]  # fmt: skip


def test_the_checkpoint_gone_on_from_stays_until_the_next_is_whole(tmp_path: Path, make_runner: Any) -> None:
    runner = make_runner(tmp_path, **{"loop.stop_after": 1})
    runner.run()
    state, _ = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    second = make_runner(tmp_path, state["metrics_offset"])
    restore(second, state)
    assert f"{second.saves:010d}" not in os.listdir(tmp_path / "checkpoints")


# --- when one is due --------------------------------------------------------------------------------------------------


class _Busy:
    busy, seconds, processor = True, 0.0, 0.0


@pytest.mark.parametrize(
    ("held", "processor", "writing", "age", "expected"),
    [
        (0.0, 0.0, 0.0, 59.9, False),
        (0.0, 0.0, 0.0, 60.1, True),
        (0.0, 0.0, 5.0, 54.9, False),
        (0.0, 0.0, 5.0, 55.1, True),  # so that it is whole after 60
        (2.0, 0.0, 0.0, 99.9, False),
        (2.0, 0.0, 0.0, 100.1, True),  # 2 s are 2 % of 100 s
        (2.0, 1.0, 3.0, 149.9, False),
        (2.0, 1.0, 3.0, 150.1, True),  # what it takes of a processor beside the loop counts, too
    ],
)
def test_the_interval_keeps_the_cost_to_two_percent(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch, held: float, processor: float, writing: float, age: float,
    expected: bool,
) -> None:  # fmt: skip
    runner = make_runner(**{"loop.checkpoint_seconds": 60})
    runner.save_seconds, runner.writer.processor, runner.writer.seconds = held, processor, writing
    monkeypatch.setattr(saving.time, "monotonic", lambda: runner.saved_at + age)
    assert due(runner) is expected
    runner.writer = _Busy()
    assert due(runner) is False


def test_what_a_checkpoint_takes_is_measured(tmp_path: Path, make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = saving.snapshot
    monkeypatch.setattr(saving, "snapshot", lambda run: (time.sleep(0.05), snapshot(run))[1])
    write, end = checkpoint.write, 0.1

    def working(*arguments: Any) -> Path:
        started = time.thread_time()
        while time.thread_time() - started < end:
            pass
        time.sleep(0.05)
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write", working)
    runner = make_runner(tmp_path)
    runner.save()
    runner.writer.wait()
    assert runner.save_seconds >= 0.05
    assert runner.writer.processor >= end
    assert runner.writer.seconds >= end + 0.05
    first = runner.save_seconds
    runner.save()
    runner.writer.wait()
    assert runner.spent["save_seconds"] == first + runner.save_seconds


# --- where experiences end --------------------------------------------------------------------------------------------


def saved_at(runner: Any, monkeypatch: pytest.MonkeyPatch, costs: float) -> list[tuple[int, bool]]:
    """(experience, whether it is trained) at each checkpoint of a run whose checkpoints cost so many seconds each."""
    found, save = list[tuple[int, bool]](), saving.save

    def noted(run: Any) -> None:
        found.append((run.progress.experience, run.progress.trained))
        save(run)
        run.save_seconds = costs

    monkeypatch.setattr(saving, "save", noted)
    runner.run()
    return found


@pytest.mark.parametrize("whole", [{"loop.checkpoint_seconds": None}, {"loop.checkpoint_every": 10**6}])
def test_every_end_is_saved_where_none_is_by_time(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whole: dict[str, Any]
) -> None:
    runner = make_runner(tmp_path, **whole)
    ends = [end for e in range(len(runner.stream)) for end in ((e, True), (e + 1, False))]
    assert saved_at(runner, monkeypatch, costs=1e6) == ends


def test_by_time_ends_are_saved_that_are_worth_it_and_those_of_requests_and_the_last(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner = make_runner(tmp_path, **{"loop.checkpoint_seconds": 1e6})
    kinds = [str(e.kind) for e in runner.stream]
    request = kinds.index("forget")
    expected = [(0, True), (request, True), (request + 1, False), (len(kinds), False)]  # the first costs nothing yet
    assert saved_at(runner, monkeypatch, costs=1e6) == expected


def test_a_watched_run_that_is_stopped_is_saved_though_it_is_not_worth_it(
    make_runner: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runner = make_runner(tmp_path, **{"loop.checkpoint_seconds": 1e6})
    runner.watch = lambda record: len(record.matrix) == 3
    with pytest.raises(Interrupted, match="after experience 1"):
        saved_at(runner, monkeypatch, costs=1e6)
    state, _ = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    assert state["progress"]["experience"] == 2
