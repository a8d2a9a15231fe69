"""A whole run with MLflow's embedded store: what stands in it afterwards, the output folder being a relative path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mixed import mixed_config

import clplat

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def test_everything_reaches_the_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = mixed_config(Path("runs")) | {"tracking": {"enabled": True, "experiment": "mixed", "tags": {"note": "x"}}}
    result = clplat.run(config, quiet=True)
    assert result.note is None

    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{tmp_path}/mlflow.db")
    experiment = client.get_experiment_by_name("mixed")
    assert experiment is not None
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED"
    assert {"strategy", "stream", "backbone", "seed", "git_commit", "note", "clplat.group"} <= run.data.tags.keys()
    assert run.data.params["loop.batch_size"] == "8"
    for name, value in result.metrics.items():
        if value is not None:
            assert run.data.metrics[name] == pytest.approx(value), name
    lines = [json.loads(x) for x in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    for name, axis in (("average_accuracy", "experience"), ("train/loss", "step")):
        expected = [x["step"] for x in lines if x["axis"] == axis and x["metrics"].get(name) is not None]
        assert [m.step for m in client.get_metric_history(run.info.run_id, name)] == expected
    assert len(run.inputs.dataset_inputs) == 5
    artifacts = {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"report.html", "summary.json", "config.yaml", "figures"} <= artifacts
