"""What must never happen, one test for each line of the design's list, under its name."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from mixed import mixed_config

import clplat
from clplat import Kind
from clplat.errors import UserError
from clplat.files import write_atomic
from clplat.run import checkpoint
from clplat.strategy import check_hooks

BAD = '''
import torch.nn.functional as F
from clplat import Kind, Strategy

class Typo(Strategy):
    """A strategy whose hook is misspelt."""
    kinds = frozenset({Kind.LEARN})
    paper = "none"

    def trainig_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])
'''

SPY = '''
import torch.nn.functional as F
from clplat import Kind, Strategy

SEEN = []

class Spy(Strategy):
    """Keeps everything that it is shown."""
    kinds = frozenset({Kind.LEARN, Kind.FORGET, Kind.ADAPT, Kind.INTERACT})
    paper = "none"

    def grow(self, experience):
        SEEN.append(experience)
        super().grow(experience)

    def begin(self, experience):
        SEEN.append(experience)

    def end(self, experience):
        SEEN.append(experience)

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self.model(batch[0]), batch[1])

    def forget_step(self, batch, batch_idx):
        return -F.cross_entropy(self.model(batch[0]), batch[1]).clamp(max=1)

    def adapt_step(self, inputs):
        SEEN.append(inputs)
        return self.model(inputs).detach()

    def act(self, observation, explore):
        return 1

    def observe(self, transition):
        return 0

    def predict(self, inputs, task=None):
        SEEN.append(("predict", task))
        return self.model(inputs)
'''


def test_a_finished_run_that_reports_numbers_from_a_strategy_silently_doing_naive_fine_tuning(tmp_path: Path) -> None:
    file = tmp_path / "typo.py"
    file.write_text(BAD)
    with pytest.raises(UserError, match="training_step"):
        clplat.run(
            strategy=f"{file}:Typo", stream="digits", output=str(tmp_path), quiet=True, tracking={"enabled": False}
        )
    assert not list(tmp_path.rglob("summary.json"))
    assert "training_step" not in vars(clplat.Strategy)  # there is no default to fall back to
    assert check_hooks(clplat.Strategy)


def _spied(tmp_path: Path, **overrides: Any) -> list[Any]:
    import sys

    file = tmp_path / "spy.py"
    file.write_text(SPY)
    clplat.run(mixed_config(tmp_path), strategy=f"{file}:Spy", quiet=True, **overrides)
    modules = [m for m in sys.modules.values() if getattr(m, "__file__", None) == str(file)]
    assert len(modules) == 1
    return modules[0].SEEN


def test_test_labels_or_future_experiences_reaching_training_or_hyper_parameter_choice(tmp_path: Path) -> None:
    seen = [s for s in _spied(tmp_path) if isinstance(s, clplat.Experience)]
    assert [s.index for s in seen] == sorted(s.index for s in seen)  # never one that is still to come
    assert len(seen) == 15
    assert all(s.test is None for s in seen)
    adapted = [s for s in seen if s.kind is Kind.ADAPT]
    assert adapted
    assert all(s.train is not None and s.train.labels is None for s in adapted)


def test_test_labels_reaching_a_learner_that_adapts_to_corrupted_images(tmp_path: Path) -> None:
    """Their effect on its weights, which is none: tests/test_adapting.py."""
    options = {"samples": 20, "corruptions": ["fog", "snow"], "order": "mixed"}
    shown = _spied(tmp_path, stream="corruptions", **{f"stream.{k}": v for k, v in options.items()})
    adapted = [s for s in shown if isinstance(s, clplat.Experience) and s.kind is Kind.ADAPT]
    assert len(adapted) == 3  # grow, begin, end
    for experience in adapted:
        assert experience.train is not None
        assert experience.train.labels is None
        assert experience.train.batch(torch.arange(5))[1] is None
        assert experience.test is None


def test_hyper_parameters_are_never_chosen_by_test_labels(tmp_path: Path) -> None:
    from clplat.sweep.study import sweep

    config = mixed_config(tmp_path)
    config["loop"]["evaluate_on"] = "test"
    config["sweep"] = {"metric": "average_accuracy", "trials": 1, "space": {"strategy.lr": {"low": 0.1, "high": 0.2}}}
    file = tmp_path / "sweep.yaml"
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match="evaluate_on"):
        sweep(file)


def test_task_identity_reaching_predict_where_the_stream_does_not_declare_it_known(tmp_path: Path) -> None:
    calls = [s for s in _spied(tmp_path) if isinstance(s, tuple) and s[0] == "predict"]
    assert calls
    assert all(task is None for _, task in calls)


def test_a_crash_that_loses_more_than_the_configured_checkpoint_interval(tmp_path: Path, make_runner: Any) -> None:
    """Every so many steps a checkpoint is whole on disk, so that a crash at any moment finds it."""
    runner, gaps = make_runner(tmp_path, **{"loop.checkpoint_every": 5}), []
    update = runner._update

    def watch(loss: Any) -> None:
        state, _ = checkpoint.load_newest(tmp_path / "checkpoints")
        if state is not None and runner.progress.experience < 4:  # an episode is saved as a whole
            gaps.append(runner.progress.total_steps - state["progress"]["total_steps"])
        update(loss)

    runner._update = watch  # type: ignore[method-assign]
    runner.run()
    assert max(gaps) <= 5
    assert len(gaps) > 50


def test_a_half_written_checkpoint_or_summary_taken_for_a_whole_one(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, {"value": torch.ones(3), "name": "good"})
    checkpoint.save(folder, 2, {"value": torch.zeros(3), "name": "newer"})
    for name, spoil in (
        ("tensors.safetensors", lambda b: b[:-4]),
        ("tensors.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1])),
        ("state.json", lambda b: b[: len(b) // 2]),
        ("state.json", lambda b: b.replace(b"newer", b"older")),
        ("state.json", lambda b: b""),
    ):
        path = folder / "0000000002" / name
        whole = path.read_bytes()
        path.write_bytes(spoil(whole))
        state, notes = checkpoint.load_newest(folder)
        assert state is not None
        assert state["name"] == "good"
        assert "0000000002 is damaged" in notes[0]
        assert "looking for one before it" in notes[0]
        path.write_bytes(whole)
    (folder / ".0000000003.99.part").mkdir()
    assert checkpoint.load_newest(folder)[0]["name"] == "newer"  # type: ignore[index]


def test_a_summary_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_atomic(path, "new and longer")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


class _Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("exit 7",)


def test_code_executed_from_a_checkpoint_a_configuration_or_a_data_file(tmp_path: Path) -> None:
    import numpy as np

    folder = tmp_path / "checkpoints"
    checkpoint.save(folder, 1, {"value": 1})
    (folder / "0000000001" / "tensors.safetensors").write_bytes(pickle.dumps(_Bomb()))
    state, notes = checkpoint.load_newest(folder)
    assert state is None
    assert notes
    with pytest.raises(TypeError, match="holds a _Bomb"):
        checkpoint.save(folder, 2, {"value": _Bomb()})
    for text in ("strategy: !!python/object/apply:os.system ['exit 7']", "strategy: {name: os.system}",
                 "strategy: {class_path: os.system}", "backbone: {name: 'subprocess.run'}"):  # fmt: skip
        file = tmp_path / "config.yaml"
        file.write_text(text)
        with pytest.raises(UserError):
            clplat.run(file, quiet=True)
    np.savez(tmp_path / "data.npz", train_inputs=np.array([_Bomb()], dtype=object))
    with pytest.raises(clplat.errors.ClplatError):
        clplat.run(strategy="naive", stream="arrays", **{"stream.path": str(tmp_path / "data.npz")}, quiet=True,
                   output=str(tmp_path), tracking={"enabled": False})  # fmt: skip


def test_a_server_that_listens_beyond_127_0_0_1_unless_asked_or_without_saying_so() -> None:
    import inspect

    from clplat.tracking import server

    assert inspect.signature(server.serve).parameters["host"].default == "127.0.0.1"
    for file in ("mlflow/server.sh", "mlflow/compose.yaml"):
        text = (Path(__file__).parent.parent / file).read_text()
        assert "127.0.0.1" in text, file
