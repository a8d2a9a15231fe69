"""The loop over all four kinds: order of hooks, exact resume, one evaluation pass, schedules, faults."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed import MIXED, mixed_config

import clplat
from clplat import Kind
from clplat.config.resolve import resolve
from clplat.errors import Interrupted, UserError
from clplat.run import checkpoint, measuring
from clplat.run.build import build_stream
from clplat.run.loop import Runner
from clplat.run.saving import restore, snapshot
from clplat.run.step import total_steps


def outcome(runner: Runner) -> dict[str, Any]:
    """All that a resume may not change: measurements apart from time, and every tensor of the learner."""
    record = runner.record.to_dict()
    del record["cost"]
    for event in record["ledger"]:
        del event["started"], event["finished"], event["seconds"]
    return {"record": record, "state": dict(runner.strategy.state_dict())}


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    assert a["record"] == b["record"]
    assert a["state"].keys() == b["state"].keys()
    for name, value in a["state"].items():
        same = torch.equal(value, b["state"][name]) if isinstance(value, torch.Tensor) else value == b["state"][name]
        assert same, name


@pytest.fixture
def straight(make_runner: Any) -> tuple[dict[str, Any], int]:
    """Outcome of an uninterrupted run, and its number of steps."""
    runner = make_runner()
    runner.run()
    return outcome(runner), runner.progress.total_steps


def test_hooks_run_in_order(make_runner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    runner, calls = make_runner(**{"loop.max_steps": 2, "loop.eval_every": None}), []
    for name in ("grow", "begin", "training_step", "forget_step", "adapt_step", "after_step", "end"):
        original = getattr(type(runner.strategy), name)

        def spy(*args: Any, name: str = name, original: Any = original) -> Any:
            calls.append(name)
            return original(*args)

        monkeypatch.setattr(type(runner.strategy), name, spy)
    runner.run()
    steps = calls[:18]
    learn = ["grow", "begin", *["training_step", "after_step"] * 2, "end"]
    forget = ["grow", "begin", *["forget_step", "after_step"] * 2, "end"]
    assert steps[:14] == learn + learn
    assert calls[14:21] == forget
    adapt = calls[21 : calls.index("grow", 22)]
    assert adapt[:2] == ["grow", "begin"]
    assert adapt[2:-1] == ["adapt_step", "after_step"] * 15  # 120 samples in batches of 8, whatever max_steps says
    assert adapt[-1] == "end"
    assert calls[-1] == "end"


def test_every_kind_is_measured(straight: tuple[dict[str, Any], int]) -> None:
    record = straight[0]["record"]
    assert [e["kind"] for e in record["experiences"]] == ["learn", "learn", "forget", "adapt", "interact"]
    assert len(record["matrix"]) == 6
    assert record["matrix"][1][0] > 0.9
    assert record["matrix"][3][2] < record["matrix"][2][2]  # erased data is no longer known
    assert record["online"][0]["seen"] == 120
    curve = record["returns"][0]["evaluations"]
    assert curve[-1][1] > record["returns"][0]["before"] or curve[-1][1] == 8.0
    assert len(record["representation"]) == 5


@pytest.mark.parametrize("stop_at", [1, 9, 20, 41, 55, 62, 75, 95, 120])
def test_resume_equals_straight(
    stop_at: int, straight: tuple[dict[str, Any], int], tmp_path: Path, make_runner: Any
) -> None:
    """Stopped in each kind, mid-experience: the resumed run is the uninterrupted one, bit for bit."""
    first = make_runner(tmp_path)
    update = first._update

    def stopping(loss: Any) -> None:
        update(loss)
        first.stop_requested = first.stop_requested or first.progress.total_steps >= stop_at

    first._update = stopping  # type: ignore[method-assign]
    assert stop_at < straight[1]
    with pytest.raises(Interrupted, match="stopped in experience"):
        first.run()
    torch.manual_seed(12345)  # whatever happened in between
    state, notes = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    assert not notes
    second = make_runner(tmp_path, state["metrics_offset"])
    restore(second, state)
    second.run()
    assert_equal(outcome(second), straight[0])


def test_checkpoint_holds_only_plain_values(straight: tuple[dict[str, Any], int], make_runner: Any) -> None:
    runner = make_runner()
    runner.run()
    tensors: dict[str, torch.Tensor] = {}
    json.dumps(checkpoint.flatten(snapshot(runner), tensors))


def test_metrics_log_has_no_gap_and_no_repeat_after_resume(tmp_path: Path, make_runner: Any) -> None:
    (tmp_path / "a").mkdir()
    runner = make_runner(tmp_path / "a", **{"loop.checkpoint_every": 10})
    runner.run()
    whole = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    state, _ = checkpoint.load_newest(tmp_path / "a" / "checkpoints")
    assert state is not None
    with open(tmp_path / "a" / "metrics.jsonl", "a") as log:
        log.write('{"torn')  # a line that a kill cut short
    again = make_runner(tmp_path / "a", state["metrics_offset"])
    restore(again, state)
    again.run()
    lines = [json.loads(line) for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [(x["axis"], x["step"]) for x in lines] == [(x["axis"], x["step"]) for x in whole]


def test_evaluation_is_one_pass_and_says_how_far_it_is(make_runner: Any, monkeypatch: Any) -> None:
    runner, seen = make_runner(), []
    said: list[tuple[int, int]] = []
    monkeypatch.setattr(runner.log, "scoring", lambda done, total: said.append((done, total)))
    predict = runner.strategy.predict
    object.__setattr__(runner.strategy, "predict", lambda x, task=None: seen.append(len(x)) or predict(x, task))
    measuring.evaluate(runner)
    total = sum(len(e.test) for e in runner.stream if e.test is not None)
    assert sum(seen) == total
    assert len(seen) == -(-total // runner.loop.eval_batch_size)  # all test sets in shared batches
    assert said == [(sum(seen[:i]), total) for i in range(len(seen))]


def test_evaluation_changes_nothing(make_runner: Any) -> None:
    runner = make_runner()
    runner._train(runner.stream[0])
    runner.strategy.dropout.eval()
    before = {k: v.clone() for k, v in runner.strategy.state_dict().items() if isinstance(v, torch.Tensor)}
    modes, rng = [m.training for m in runner.strategy.modules()], torch.get_rng_state()
    measuring.evaluate(runner)
    assert [m.training for m in runner.strategy.modules()] == modes
    assert torch.equal(torch.get_rng_state(), rng)
    assert all(torch.equal(v, before[k]) for k, v in runner.strategy.state_dict().items() if k in before)


def test_a_ragged_window_of_batches_is_the_larger_batch(make_runner: Any) -> None:
    """80 samples: batches of 7 four at a time end where batches of 28 do, the last window being 4 of 24 samples."""
    naive, ends = {"strategy": "naive", "backbone": {"name": "mlp", "hidden": [16]}}, []
    plain = {"stream": f"{MIXED}:MixedLearn", "loop": {"checkpoint_seconds": None}, "seed": 1}
    for size, accumulate in ((28, 1), (7, 4)):
        runner = make_runner(of=naive | plain, **{"loop.batch_size": size, "loop.accumulate": accumulate})
        runner.strategy.double()
        runner._train(runner.stream[0])
        assert runner.progress.steps == 3
        ends.append([p.detach().clone() for p in runner.strategy.model.parameters()])
    torch.testing.assert_close(ends[0], ends[1], rtol=0, atol=1e-12)


def test_accumulation_steps_once_per_window(make_runner: Any) -> None:
    plain, runner = make_runner(), make_runner(**{"loop.accumulate": 3, "loop.max_epochs": 1, "loop.eval_every": None})
    after, calls = runner.strategy.after_step, []
    object.__setattr__(runner.strategy, "after_step", lambda: calls.append(1) or after())
    runner._train(runner.stream[0])
    batches = -(-len(runner.stream[0].train) // 8)
    assert len(calls) == runner.progress.steps == -(-batches // 3) == total_steps(runner, runner.stream[0])
    assert total_steps(plain, plain.stream[0]) == 2 * batches


def test_cosine_schedule_with_warmup_ends_near_zero(make_runner: Any) -> None:
    runner = make_runner(
        **{"strategy.schedule": "cosine", "strategy.warmup": 0.2, "strategy.lr": 0.5, "loop.max_epochs": 5}
    )
    rates: list[float] = []
    original = runner.strategy.after_step

    def note() -> None:
        rates.append(runner.optimizer.param_groups[0]["lr"])
        original()

    object.__setattr__(runner.strategy, "after_step", note)
    runner._train(runner.stream[0])
    assert len(rates) == 50
    assert rates[:10] == pytest.approx([0.05 * (i + 1) for i in range(10)])
    assert max(rates) == pytest.approx(0.5)
    assert rates[-1] < 0.01
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_a_kind_that_is_not_declared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not handle kind 'adapt'") as caught:
        clplat.run(mixed_config(tmp_path), strategy="naive", quiet=True)
    assert len(caught.value.faults) == 3  # forget, adapt and interact, all at once


def test_run_directory_is_what_the_contract_says(run_mixed: Any) -> None:
    result = run_mixed()
    assert result.status == "complete"
    names = {p.name for p in result.run_dir.iterdir()}
    assert {"config.yaml", "summary.json", "metrics.jsonl", "checkpoints", "report.html"} <= names
    assert not list(result.run_dir.rglob("*.part"))
    summary = json.loads((result.run_dir / "summary.json").read_text())
    assert summary == json.loads(json.dumps(result.summary))
    null = [f"cost.{k}" for k, v in summary["cost"].items() if v is None]
    null += [k for k, v in summary["metrics"].items() if v is None]
    assert set(null) <= summary["why_null"].keys()
    assert len(list((result.run_dir / "checkpoints").iterdir())) == checkpoint.KEEP


def test_the_resolved_config_gives_the_same_run(run_mixed: Any, tmp_path: Path) -> None:
    first = run_mixed()
    again = clplat.run(first.run_dir / "config.yaml", quiet=True, output=str(tmp_path / "again"))
    for key in ("accuracy_matrix", "metrics", "config_sha256", "representation"):
        assert first.summary[key] == again.summary[key], key


def test_loaded_learner_predicts_as_the_run_did(run_mixed: Any) -> None:
    result = run_mixed()
    learner = clplat.load(result.run_dir)
    stream = build_stream(resolve(config=result.run_dir / "config.yaml"))
    assert not learner.training
    for experience in stream:
        if experience.test is not None:
            inputs, labels = experience.test.all()
            with torch.no_grad():
                score = (learner.predict(inputs).argmax(1) == labels).double().mean().item()
            assert score == pytest.approx(result.accuracy_matrix[-1][experience.index], abs=1e-9)


def test_stop_after_ends_early_and_completely(run_mixed: Any) -> None:
    result = run_mixed(**{"loop.stop_after": 2})
    assert result.status == "complete"
    assert len(result.accuracy_matrix) == 3
    assert [e["kind"] for e in result.summary["experiences"]][2] == Kind.FORGET


def test_dry_run_leaves_nothing_behind(tmp_path: Path) -> None:
    result = clplat.run(mixed_config(tmp_path), quiet=True, dry_run=True)
    assert result.status == "complete"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("precision", "activations"),
    [
        ("32-true", torch.float32),
        ("bf16-mixed", torch.bfloat16),
    ],
)
def test_precision_asked_for_is_the_one_computed_in(precision: str, activations: torch.dtype, make_runner: Any) -> None:
    """In training, adaptation, evaluation and measurement alike, on one device too."""
    runner, seen = make_runner(**{"fabric.precision": precision, "loop.max_steps": 2, "loop.stop_after": 4}), set()
    layers = [m for m in runner.strategy.modules() if isinstance(m, torch.nn.Linear)]
    for layer in layers:
        layer.register_forward_hook(lambda module, inputs, output: seen.add((module.training, output.dtype)))
    runner.loop.representation = False
    runner.run()
    assert {dtype for _, dtype in seen} == {activations}
    assert {training for training, _ in seen} == {True, False}


def test_a_head_of_class_means_is_filled_by_the_loop(tmp_path: Path) -> None:
    """On frozen random features, whatever the strategy, and for joint over all classes seen."""
    means = {}
    for strategy in ("naive", "joint"):
        run = clplat.run(strategy=strategy, head="ncm", output=str(tmp_path), quiet=True, tracking={"enabled": False},
                         **{"loop.max_steps": 30, "loop.stop_after": 2, "stream.experiences": 2})  # fmt: skip
        learner = clplat.load(run.run_dir)
        means[strategy] = learner.model.head.counts.tolist()
        assert run.accuracy_matrix[-1][1] > 0.5
    assert means["naive"] == means["joint"]
    assert min(means["joint"]) > 130
    assert run.accuracy_matrix[-1][0] > 0.5  # the means of old classes were made anew by the retrained backbone


@pytest.mark.parametrize("experience", range(5))
def test_a_stop_in_an_evaluation_does_not_wait_for_it_and_resumes_equal(
    experience: int, straight: tuple[dict[str, Any], int], tmp_path: Path, make_runner: Any
) -> None:
    small = {"loop.eval_batch_size": 16}
    first, scored = make_runner(tmp_path, **small), list[int]()
    logits = first.evaluate._logits

    def stopping(*arguments: Any) -> torch.Tensor:
        if len(first.record.matrix) == experience + 1:
            first.stop_requested = True
            torch.rand(3)  # what an evaluation draws is drawn anew
            scored.append(first.progress.experience)
        return logits(*arguments)

    first.evaluate._logits = stopping
    with pytest.raises(Interrupted, match=rf"stopped in experience {experience} .*before its scores"):
        first.run()
    assert scored == [experience]  # one batch of several
    state, _ = checkpoint.load_newest(tmp_path / "checkpoints")
    assert state is not None
    second = make_runner(tmp_path, state["metrics_offset"], **small)
    restore(second, state)
    second.run()
    assert_equal(outcome(second), straight[0])


def test_a_stop_in_the_first_evaluation_says_that_there_is_no_checkpoint(tmp_path: Path, make_runner: Any) -> None:
    runner = make_runner(tmp_path)
    runner.stop_requested = True
    with pytest.raises(Interrupted, match="no checkpoint yet"):
        runner.run()
    assert not list((tmp_path / "checkpoints").glob("*"))
