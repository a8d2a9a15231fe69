"""Study, trial and seed as nested runs in MLflow; what the study's run holds."""

from __future__ import annotations

import _thread
import json
import signal
import threading
from html import escape
from pathlib import Path
from typing import Any

import pytest
import yaml

import clplat
from clplat.config.resolve import resolve
from clplat.config.settings import TrackingSettings
from clplat.sweep.study import sweep
from clplat.sweep.tracked import begin
from clplat.tracking import nested
from clplat.tracking.client import Tracker, pending, send_pending
from clplat.tracking.state import parent_of, read_state, write_state
from clplat.tracking.store import RunSender

mlflow = pytest.importorskip("mlflow")
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def settings(folder: Path) -> TrackingSettings:
    return TrackingSettings(uri=f"sqlite:///{folder}/mlflow.db")


def tracked(run_dir: Path, own: TrackingSettings) -> Tracker:
    run_dir.mkdir(parents=True)
    return Tracker(run_dir, own, run_name=run_dir.name, params={"output": "runs"}, tags={}, datasets=[])


def write(tmp_path: Path, own: TrackingSettings, trials: int) -> Path:
    """A small sweep of two metrics under two seeds."""
    config = {
        "strategy": "naive", "backbone": "mlp",
        "stream": {"name": "digits", "train_per_class": 20, "test_per_class": 5, "validation": 0.2},
        "loop": {"max_steps": 2, "representation": False}, "output": str(tmp_path / "runs"),
        "tracking": {"uri": own.uri},
        "sweep": {"metric": ["plasticity", "stability"], "trials": trials, "seeds": [0, 1], "sampler": "random",
                  "give_up": "never", "space": {"strategy.lr": {"low": 1e-3, "high": 0.1}}},
    }  # fmt: skip
    path = tmp_path / "demo.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def runs(own: TrackingSettings) -> dict[str, Any]:
    """Name → run."""
    client = mlflow.MlflowClient(own.uri)
    experiment = client.get_experiment_by_name("clplat")
    return {run.info.run_name: run for run in client.search_runs([experiment.experiment_id])}


def parent(found: dict[str, Any], name: str) -> str | None:
    """Name of the run that another is nested under."""
    ids = {run.info.run_id: name for name, run in found.items()}
    return ids.get(found[name].data.tags.get("mlflow.parentRunId"))


def test_a_run_is_nested_under_the_nearest_folder_that_was_begun(tmp_path: Path) -> None:
    own, study = settings(tmp_path), tmp_path / "study"
    nested.begin(study, own, tmp_path, "study", "study", {})
    nested.begin(study / "trial-0", own, tmp_path, "trial", "study/trial-0", {})
    first = read_state(study)
    nested.begin(study, own, tmp_path, "study", "study", {})
    assert read_state(study) == first, "a second call does nothing"
    state = {"uri": first["uri"], "experiment": first["experiment"]}
    assert parent_of(study / "trial-0" / "digits" / "seed-0", state) == study / "trial-0"
    assert parent_of(study / "held-out" / "trial-0" / "seed-0", state) == study
    assert parent_of(study / "trial-0", state) == study
    assert parent_of(tmp_path / "demo" / "seed-0", state) is None
    (tmp_path / "demo").mkdir()
    write_state(tmp_path / "demo", {k: v for k, v in first.items() if k != "nests"})  # a run, which holds another
    assert parent_of(tmp_path / "demo" / "seed-0", state) is None
    assert parent_of(study / "trial-0" / "seed-0", {**state, "experiment": "another"}) is None
    nested.begin(tmp_path / "off", TrackingSettings(enabled=False), tmp_path, "study", "off", {})
    assert not (tmp_path / "off").exists()


@pytest.mark.parametrize(
    ("place", "trial"),
    [
        ("trial-0/seed-0", "trial-0"),
        ("trial-0/digits/seed-0", "trial-0"),
        ("held-out/trial-0/seed-0", "held-out/trial-0"),
    ],
)
def test_a_run_of_a_sweep_is_nested_under_its_trial_and_that_under_the_study(tmp_path, place, trial) -> None:
    study = tmp_path / "study"
    config = resolve(strategy="naive", output=str(tmp_path), **{"tracking.uri": f"sqlite:///{tmp_path}/mlflow.db"})
    begin(study, study / place, config)
    state = read_state(study / trial)
    assert (state["run_name"], state["tags"]["clplat.kind"], state["nests"]) == (f"study/{trial}", "trial", True)
    assert parent_of(study / place, state) == study / trial
    assert parent_of(study / trial, state) == study
    assert sorted(p.parent for p in tmp_path.rglob("tracking.json")) == [study, study / trial]


@pytest.mark.slow
def test_study_trial_and_seeds_reach_the_store_whichever_comes_first(tmp_path: Path) -> None:
    own, study = settings(tmp_path), tmp_path / "study"
    nested.begin(study, own, tmp_path, "study", "study", {"strategy": "er"})
    nested.begin(study / "trial-0", own, tmp_path, "trial", "trial", {})
    seeds = [tracked(study / "trial-0" / f"seed-{seed}", own) for seed in (0, 1)]
    for one in seeds:  # at the same time: both want to open those above them
        one.start()
    assert [one.finish("FINISHED", []) for one in seeds] == [None, None]
    found = runs(own)
    assert set(found) == {"study", "trial", "seed-0", "seed-1"}
    assert [parent(found, name) for name in ("seed-0", "seed-1", "trial", "study")] == ["trial", "trial", "study", None]
    assert {found[name].info.status for name in ("study", "trial")} == {"RUNNING"}
    assert not any("clplat.run" in found[name].data.tags for name in ("study", "trial")), "no runs of a learner"

    (study / "best.yaml").write_text("strategy: er\n")
    nested.end(
        study / "trial-0", "KILLED", params={"strategy.lr": 0.1}, metrics={"stability": 0.5}, tags={"why": "slow"}
    )
    nested.end(study, "FINISHED", params={"trials": 1}, metrics={"stability": 0.5}, tags={},
               artifacts=[study / "best.yaml"], ended=read_state(study)["started"] + 90)  # fmt: skip
    assert pending(study) == [study, study / "trial-0"]
    assert nested.send(study) is None
    assert pending(study) == []
    found = runs(own)
    assert (found["trial"].info.status, found["trial"].data.params) == ("KILLED", {"strategy.lr": "0.1"})
    assert found["trial"].data.metrics == found["study"].data.metrics == {"stability": 0.5}
    assert found["trial"].data.tags["why"] == "slow"
    info = found["study"].info
    assert info.end_time - info.start_time == pytest.approx(90_000, abs=1)
    assert [a.path for a in mlflow.MlflowClient(own.uri).list_artifacts(info.run_id)] == ["best.yaml"]


def test_a_store_that_is_away_is_told_in_a_line_and_gets_all_later(tmp_path: Path) -> None:
    own = TrackingSettings(uri="http://127.0.0.1:1")  # nothing listens there
    nested.begin(tmp_path / "study", own, tmp_path, "study", "study", {})
    nested.end(tmp_path / "study", "FINISHED", params={}, metrics={}, tags={})
    note = nested.send(tmp_path / "study")
    assert note is not None
    assert note.startswith("tracking: not everything reached http://127.0.0.1:1")
    assert "clplat ui" in note
    assert pending(tmp_path / "study") == [tmp_path / "study"]


def held_back(tmp_path: Path, uri: str) -> Path:
    """A study of three trials, nothing of which has been sent."""
    for folder in (tmp_path / "study", *(tmp_path / f"study/trial-{i}" for i in range(3))):
        nested.begin(folder, TrackingSettings(uri=uri), tmp_path, "study", folder.name, {})
        nested.end(folder, "FINISHED", params={}, metrics={}, tags={})
    return tmp_path / "study"


def test_a_server_is_sent_several_runs_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    together, sent = threading.Barrier(4), list[Path]()

    def send(run_dir: Path) -> None:
        together.wait(30)  # for all four, or breaks
        sent.append(run_dir)

    monkeypatch.setattr(nested, "send_pending", send)
    study = held_back(tmp_path, "http://127.0.0.1:1")
    assert nested.send(study) is None
    assert sorted(sent) == sorted([study, *study.glob("trial-*")])


def test_a_file_is_sent_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    threads = set[int]()
    monkeypatch.setattr(nested, "send_pending", lambda run_dir: threads.add(threading.get_ident()))
    assert nested.send(held_back(tmp_path, f"sqlite:///{tmp_path}/mlflow.db")) is None
    assert len(threads) == 1


@pytest.mark.parametrize(("seconds", "why"), [(0.1, "it took longer than 0.1 s"), (60.0, "was ended by Ctrl-C")])
def test_a_slow_server_does_not_keep_a_study_that_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float, why: str
) -> None:
    free = threading.Event()

    def send(run_dir: Path) -> None:
        if seconds > 1 and run_dir.name == "study":
            _thread.interrupt_main()
        free.wait(60)

    monkeypatch.setattr(nested, "send_pending", send)
    monkeypatch.setattr(nested, "LONGEST_SECONDS", seconds)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell has its background jobs ignore
    try:
        note = nested.send(held_back(tmp_path, "http://127.0.0.1:1"))
    finally:
        signal.signal(signal.SIGINT, before)
        free.set()
    assert note is not None
    assert why in note


def test_two_never_send_one_run_at_the_same_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sender of a run that was left behind, and what sends the rest at the end of its study."""
    own, run_dir, senders = settings(tmp_path), tmp_path / "runs/study/0", list[str]()
    begun, free = threading.Event(), threading.Event()

    def send(sender: RunSender, **options: Any) -> None:
        senders.append(threading.current_thread().name)
        begun.set()
        free.wait(60)

    monkeypatch.setattr(RunSender, "send", send)
    monkeypatch.setattr(RunSender, "close", lambda sender: sender.state.update(done=True) or sender._save())
    left = tracked(run_dir, own)
    assert left.finish("FINISHED", [], timeout_seconds=0.1) is not None
    assert begun.wait(60)
    later = threading.Thread(target=send_pending, args=(run_dir,), name="later")
    later.start()
    later.join(0.5)
    alone = list(senders)
    free.set()
    later.join(60)
    assert alone == ["clplat-tracking"]
    assert not pending(run_dir)


@pytest.mark.slow
def test_a_sweep_leaves_its_runs_nested_with_figures_and_a_configuration_that_runs(tmp_path: Path) -> None:
    own = settings(tmp_path)
    result = sweep(write(tmp_path, own, trials=3), quiet=True)
    found = runs(own)
    assert len(found) == 1 + 3 + 3 * 2
    for trial in result.trials:
        name = f"demo/trial-{trial['number']:04d}"
        assert parent(found, name) == "demo"
        assert found[name].data.metrics == pytest.approx(
            dict(zip(("valid/plasticity", "valid/stability"), trial["values"], strict=True))
        )
        for seed in (0, 1):
            assert parent(found, f"{name.replace('/', '-')}-{seed}") == name
    client = mlflow.MlflowClient(own.uri)
    files = {a.path for a in client.list_artifacts(found["demo"].info.run_id)}
    assert files == {"best.yaml", "front", "sweep.json", "report.md", "study.html"}
    (kept,) = (tmp_path / "mlartifacts").rglob("best.yaml")
    best = yaml.safe_load(kept.read_text())
    assert {"strategy.lr": best["strategy"]["lr"]} == result.best_params
    assert json.loads((result.folder / "sweep.json").read_text())["best"]["params"] == result.best_params
    again = clplat.run(kept, quiet=True)  # as `clplat run` does on the artifact
    effort = json.loads((result.folder / "sweep.json").read_text())["effort"]
    summary = json.loads((again.run_dir / "summary.json").read_text())
    assert summary["tuned"].startswith("study demo: end-of-stream validation (optimistic")
    assert summary["tuned"].endswith(f"; {effort}")
    assert f"is tuned: {escape(summary['tuned'])}." in (again.run_dir / "report.html").read_text()
    assert {run.data.tags.get("tuned") for run in runs(own).values()} == {None, summary["tuned"]}
    page = (result.folder / "study.html").read_text()
    for title in ("Front", "Importances: plasticity", "Slice: stability", "Optimization history: plasticity",
                  "Parallel coordinate: stability", "Timeline"):  # fmt: skip
        assert f"<h2>{title}</h2><div" in page, title
    assert "<script src" not in page
