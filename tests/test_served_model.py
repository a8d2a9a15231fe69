"""The learner of a run as MLflow logs, loads and serves it: what `clplat.load` predicts, and nothing pickled."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
from texts import write_sets

import clplat
from clplat.errors import UserError
from clplat.run import model
from clplat.streams.digits import Digits
from clplat.tracking.state import read_state

pytestmark = [
    pytest.mark.filterwarnings(f"ignore::{kind}")  # of MLflow's and its parts'
    for kind in ("DeprecationWarning", "FutureWarning", "UserWarning", "ResourceWarning",
                 "pytest.PytestUnraisableExceptionWarning")
]  # fmt: skip
SMALL = {"train_per_class": 20, "test_per_class": 8}
MLP = {"name": "mlp", "hidden": [16]}


def tracked(folder: Path, model: bool | None = None, **config: Any) -> Any:
    tracking = {"uri": f"sqlite:///{folder / 'mlflow.db'}", "model": model}
    loop = {"max_steps": 5, "batch_size": 8, "checkpoint_seconds": None}
    plain = {"seed": 0, "fabric": {"accelerator": "cpu"}, "tracking": tracking, "loop": loop, **config}
    return clplat.run({**plain, "output": str(folder / "runs")}, quiet=True)


def images(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    """A run, raw inputs, and how they are sent."""
    result = tracked(
        folder, strategy="er", stream={"name": "digits", **SMALL}, backbone={"name": "mlp", "hidden": [16]}
    )
    raw = Digits(seed=0, **SMALL)[0].test.all()[0][:3].numpy()
    return result, raw, {"inputs": raw.tolist()}


def texts(folder: Path) -> tuple[Any, Any, dict[str, Any]]:
    sets = {"benchmark": "jsonl", "path": str(write_sets(folder / "sets")), "tasks": ["color", "size"]}
    stream = {"name": "text", **sets, "tokenizer": "bytes", "answer": "class"}
    backbone = {"name": "text_encoder", "dim": 16, "depth": 1}
    result = tracked(folder, strategy={"name": "lora", "lr": 1e-2}, stream=stream, backbone=backbone)
    asked = ["color 1?", "size 2?", "a longer text"]
    return result, asked, {"dataframe_split": {"columns": ["text"], "data": [[text] for text in asked]}}


def rows(said: Any) -> list[dict[str, Any]]:
    """Predictions as they are served."""
    scores = [[v if np.isfinite(v) else None for v in row] for row in said.scores.tolist()]
    return [{"id": i, "name": n, "scores": s} for i, n, s in zip(said.ids.tolist(), said.names, scores, strict=True)]


def same(found: list[dict[str, Any]], said: Any) -> None:
    expected = rows(said)
    assert [(r["id"], r["name"]) for r in found] == [(r["id"], r["name"]) for r in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["scores"] == pytest.approx(other["scores"], rel=1e-4, abs=1e-4)


@pytest.mark.slow
def test_the_learner_after_a_request_takes_the_place_of_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import mlflow

    def kept() -> set[str]:
        return {f.parts[-7] for f in (tmp_path / "mlartifacts").rglob("checkpoints/*/tensors.safetensors")}

    stream = {"name": "digits", **SMALL, "experiences": 2}
    result = tracked(tmp_path, strategy="finetune_retained", stream=stream, backbone=MLP)
    before, stored = read_state(result.run_dir), kept()
    learner = clplat.forget(result.run_dir, "class:1")
    after = read_state(result.run_dir)
    assert before is not None
    assert after is not None
    assert after["model_id"] != before["model_id"]
    client = mlflow.MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with pytest.raises(mlflow.exceptions.MlflowException, match="not found"):
        client.get_logged_model(before["model_id"])
    raw = Digits(seed=0, **SMALL)[0].test.all()[0][:3].numpy()
    same(mlflow.pyfunc.load_model(str(result.run_dir / "model")).predict(raw).to_dict("records"), learner(raw))
    assert len(stored) == len(kept()) == 1, "the files of the learner before are gone with it"
    assert stored != kept()
    monkeypatch.setattr(model, "LOGGED_MIB", 0)  # and one that has grown too large
    assert "not logged" not in capsys.readouterr().err
    clplat.forget(result.run_dir, "class:2")
    line = (
        r"clplat: the learner is not logged as a model: its checkpoint has \d+ MiB, more than 0 \(tracking.model: true"
    )
    assert re.match(line, capsys.readouterr().err)
    assert kept() == set()
    assert not (result.run_dir / "model").exists()
    assert client.search_logged_models([client.get_experiment_by_name("clplat").experiment_id]) == []


def test_what_cannot_be_served_is_refused_before_it_runs(tmp_path: Path) -> None:
    given = (np.zeros((8, 4)), np.arange(8) % 2)
    stream = {"name": "arrays", "train": given, "test": given, "experiences": 1}
    with pytest.raises(UserError, match=r"tracking\.model: true, but \S+@python:\w+ was given in Python") as refused:
        tracked(tmp_path, True, strategy="naive", stream=stream, backbone=MLP)
    assert len(refused.value.faults) == 1
    assert not (tmp_path / "runs").exists()


@contextmanager
def served(
    model: str, uri: str, folder: Path | None = None, environment: dict[str, str] | None = None
) -> Iterator[str]:
    """Address of `mlflow models serve` on a model; it and what it started end with the block."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", model, "-h", "127.0.0.1", "-p", str(port),
               "--env-manager", "local"]  # fmt: skip
    there = str(Path(sys.executable).parent)  # of uvicorn
    own = {"MLFLOW_TRACKING_URI": uri, "PATH": f"{there}{os.pathsep}{os.environ['PATH']}"}
    process = subprocess.Popen(command, cwd=folder, env={**(environment or os.environ), **own}, start_new_session=True,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    try:
        for _ in range(600):
            assert process.poll() is None, process.communicate()[1].decode()[-2000:]
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ping", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/invocations"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.mark.slow
@pytest.mark.parametrize("make", [images, texts])
def test_a_logged_and_a_served_learner_answer_as_the_loaded_one(make: Any, tmp_path: Path) -> None:
    import mlflow

    result, raw, sent = make(tmp_path)
    state, said = read_state(result.run_dir), clplat.load(result.run_dir)(raw)
    assert state is not None
    uri, folder = f"sqlite:///{tmp_path / 'mlflow.db'}", result.run_dir / "model"
    logged = mlflow.MlflowClient(uri).get_logged_model(state["model_id"])
    assert (logged.name, logged.source_run_id, str(logged.status)) == ("learner", state["run_id"], "READY")
    kinds = {f.suffix for f in folder.rglob("*") if f.is_file()}
    assert kinds == {".json", ".safetensors", ".txt", ".yaml", ""}  # without an end: MLmodel
    assert f"clplat=={clplat.__version__}" in (folder / "requirements.txt").read_text().split()
    model = mlflow.pyfunc.load_model(str(folder))
    assert len(model.predict(model.input_example)) > 0
    given = pandas.DataFrame({"text": raw}) if model.metadata.get_input_schema().has_input_names() else raw
    same(model.predict(given).to_dict("records"), said)
    with served(f"runs:/{state['run_id']}/learner", uri) as address:
        request = urllib.request.Request(address, json.dumps(sent).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            same(json.load(answer)["predictions"], said)
