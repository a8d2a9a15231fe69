"""The adapt loop over streams of corruptions: predict first, no labels, exact resume, errors by part."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from adapting import Permuted
from safetensors.torch import load_file

import clplat
from clplat.errors import Interrupted, UserError
from clplat.run import checkpoint
from clplat.run.saving import restore

FILE = Path(__file__).with_name("adapting.py")


def configuration(output: Path, **stream: Any) -> dict[str, Any]:
    return {
        "name": "adapting",
        "strategy": {"name": f"{FILE}:Adapting", "lr": 0.02},
        "stream": {"name": f"{FILE}:Permuted", **stream},
        "backbone": {"name": "mlp", "hidden": [16]},
        "loop": {"max_epochs": 3, "batch_size": 32, "checkpoint_seconds": None},
        "tracking": {"enabled": False},
        "output": str(output),
        "seed": 1,
    }


@pytest.fixture
def make_adapting(make_runner: Callable[..., Any]) -> Callable[..., Any]:
    """Makes runners over the stream."""
    return partial(make_runner, of=configuration(Path("unused")))


def run(output: Path, overrides: dict[str, Any] | None = None, **stream: Any) -> Any:
    return clplat.run(configuration(output, **stream), quiet=True, **(overrides or {}))


def weights(result: Any) -> dict[str, torch.Tensor]:
    state, _ = checkpoint.load_newest(Path(result.run_dir) / "checkpoints")
    return {k: v for k, v in state["strategy"].items() if isinstance(v, torch.Tensor)}


def summary(result: Any) -> dict[str, Any]:
    return json.loads((Path(result.run_dir) / "summary.json").read_text())


@pytest.mark.parametrize("order", ["continual", "mixed"])
def test_permuted_labels_change_metrics_only(order, tmp_path):
    """Labels of data that are adapted to never reach the learner."""
    plain, permuted = run(tmp_path / "a", order=order), run(tmp_path / "b", order=order, by=5)
    first, second = weights(plain), weights(permuted)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert permuted.metrics["online_error"] != plain.metrics["online_error"]
    assert permuted.metrics["source_accuracy"] == plain.metrics["source_accuracy"]
    still = run(tmp_path / "c", {"strategy.lr": 0.05}, order=order)  # what does reach it changes it
    assert any(not torch.equal(first[k], weights(still)[k]) for k in first)


def test_a_batch_is_predicted_and_scored_before_the_learner_adapts_to_it(tmp_path, make_adapting):
    """A step so large that it would show: the error of each batch is that of the weights before it."""
    runner = make_adapting(None, **{"strategy.lr": 5.0})
    hook, expected = runner.hook, []

    def watched(name: str) -> Any:
        step = hook(name)
        if name != "adapt_step":
            return step

        def before(inputs: torch.Tensor) -> Any:
            with torch.no_grad():
                expected.append(runner.strategy.model(inputs).argmax(1))
            return step(inputs)

        return before

    runner.hook = watched
    runner.run()
    start = 0
    for entry in runner.record.online:
        data = runner.stream[entry["experience"]].train
        batches = expected[start : start + -(-len(data) // 32)]
        start += len(batches)
        assert entry["correct"] == (torch.cat(batches) == data.targets()).sum()
        assert entry["seen"] == 90


def outcome(runner: Any) -> dict[str, Any]:
    state = {k: v.clone() for k, v in runner.strategy.state_dict().items() if isinstance(v, torch.Tensor)}
    return {"state": state, "online": runner.record.online, "matrix": runner.record.matrix}


@pytest.mark.parametrize("order", ["continual", "mixed"])
def test_resume_in_the_middle_of_a_stream_is_exact(order, tmp_path, make_adapting):
    """Stopped within an adapt experience, after a few of its batches."""
    straight = make_adapting(None, **{"stream.order": order, "stream.rounds": 2})
    straight.run()
    learning, total = 3 * 45, straight.progress.total_steps
    for stop_at in (learning + 2, (learning + total) // 2, total - 1):
        folder = tmp_path / f"{order}{stop_at}"
        folder.mkdir()
        first = make_adapting(folder, **{"stream.order": order, "stream.rounds": 2})
        update = first._update

        def stopping(loss: Any, first: Any = first, update: Any = update, stop_at: int = stop_at) -> None:
            update(loss)
            first.stop_requested = first.stop_requested or first.progress.total_steps >= stop_at

        first._update = stopping
        with pytest.raises(Interrupted):
            first.run()
        assert first.progress.batch > 0  # within an experience
        state, _ = checkpoint.load_newest(folder / "checkpoints")
        second = make_adapting(folder, state["metrics_offset"], **{"stream.order": order, "stream.rounds": 2})
        restore(second, state)
        torch.manual_seed(99)
        second.run()
        expected, found = outcome(straight), outcome(second)
        assert found["online"] == expected["online"]
        assert found["matrix"] == expected["matrix"]
        assert all(torch.equal(found["state"][k], expected["state"][k]) for k in expected["state"])


def test_errors_by_corruption_and_round_reach_summary_log_and_matrix(tmp_path):
    result = run(tmp_path, rounds=2)
    whole = summary(result)
    found = whole["adaptation"]
    assert list(found["error_by_domain"]) == ["fog", "shot_noise", "glass_blur"]
    assert len(found["error_by_round"]) == 2
    errors = [s["error"] for s in found["segments"]]
    assert result.metrics["online_error"] == pytest.approx(sum(errors) / 6)
    assert result.metrics["round_drift"] == pytest.approx(sum(errors[3:]) / 3 - sum(errors[:3]) / 3)
    assert result.metrics["source_drop"] == pytest.approx(
        whole["accuracy_matrix"][1][0] - whole["accuracy_matrix"][-1][0]
    )
    lines = [json.loads(line) for line in (Path(result.run_dir) / "metrics.jsonl").read_text().splitlines()]
    by_domain = [v for x in lines for k, v in x["metrics"].items() if k.startswith("online_error/")]
    assert by_domain == pytest.approx(errors)
    running = [x["metrics"]["adapt/running_error"] for x in lines if "adapt/running_error" in x["metrics"]]
    assert running[-1] == pytest.approx(sum(errors) / 6)


def test_a_mixed_stream_is_scored_by_corruption(tmp_path):
    result = run(tmp_path, order="mixed")
    found = summary(result)["adaptation"]
    assert {s["domain"]: s["samples"] for s in found["segments"]} == {"fog": 90, "shot_noise": 90, "glass_blur": 90}
    errors = [s["error"] for s in found["segments"]]
    assert result.metrics["online_error"] == pytest.approx(sum(errors) / 3)
    assert len(set(errors)) > 1


def kept(run_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {p.name: load_file(p) for p in sorted((Path(run_dir) / "predictions").glob("*.safetensors"))}


def errors_of(run_dir: Path) -> list[float]:
    """Online errors by experience, from what is kept alone."""
    return [1 - (f["predictions"].argmax(1) == f["labels"]).float().mean().item() for f in kept(run_dir).values()]


def test_errors_can_be_recomputed_from_kept_predictions(tmp_path):
    result = run(tmp_path, {"loop.keep_predictions": True})
    assert list(kept(result.run_dir)) == ["0001.safetensors", "0002.safetensors", "0003.safetensors"]
    segments = [s["error"] for s in summary(result)["adaptation"]["segments"]]
    assert errors_of(result.run_dir) == pytest.approx(segments)
    assert sum(segments) / 3 == pytest.approx(result.metrics["online_error"])
    stream = Permuted(seed=1)
    for number, found in enumerate(kept(result.run_dir).values(), start=1):
        data = stream[number].train
        assert torch.equal(found["rows"], data.row_ids())
        assert torch.equal(found["labels"], data.targets())
    assert not (Path(run(tmp_path / "without").run_dir) / "predictions").exists()


def test_kept_predictions_are_whole_after_a_resume(tmp_path, make_adapting):
    options, folders = {"loop.keep_predictions": True}, [tmp_path / "straight", tmp_path / "cut"]
    for folder in folders:
        folder.mkdir()
    make_adapting(folders[0], **options).run()
    first = make_adapting(folders[1], **options)
    update = first._update

    def stopping(loss: Any) -> None:
        update(loss)
        first.stop_requested = first.progress.total_steps >= 3 * 45 + 2  # two of three batches into the first

    first._update = stopping
    with pytest.raises(Interrupted):
        first.run()
    state, _ = checkpoint.load_newest(folders[1] / "checkpoints")
    second = make_adapting(folders[1], state["metrics_offset"], **options)
    restore(second, state)
    second.run()
    expected, found = kept(folders[0]), kept(folders[1])
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[f][k], v) for f, tensors in expected.items() for k, v in tensors.items())


def test_keeping_predictions_is_refused_where_nothing_adapts(tmp_path):
    with pytest.raises(UserError, match=r"loop\.keep_predictions: true, but the stream has no adapt experience"):
        clplat.run(strategy="naive", stream="digits", quiet=True, output=str(tmp_path),
                   **{"loop.keep_predictions": True, "tracking.enabled": False})  # fmt: skip
