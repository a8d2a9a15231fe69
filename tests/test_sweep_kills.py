"""kill -9 of a worker at three moments: no trial is lost, no finished one is run again, and none waits for a beat."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from sweeping import write

RUN = """
    import functools, time
    from clplat.sweep.study import perform

    def run(config, run_dir, *more):
        run_dir.mkdir(parents=True, exist_ok=True)
        with open(run_dir / "begun", "a") as file:
            file.write("resumed " if list(run_dir.glob("checkpoints/*/*")) else "new ")
        found = perform([], config, run_dir, *more)
        (run_dir / "ended").touch()
        time.sleep(0.3)  # the moment between the end of a run and its figure in the study
        return found
"""
SWEEP = """
    import sys, killed_runs
    from clplat.sweep.study import sweep

    if __name__ == "__main__":
        sweep(sys.argv[1], workers=2, run=killed_runs.run)
"""


def owners(storage: str) -> dict[str, int]:
    """Folder of each trial under way → process that works on it."""
    import optuna

    from clplat.sweep.store import _storage

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    trials = optuna.load_study(study_name="demo", storage=_storage(storage)).get_trials(deepcopy=False)
    attrs = [t.user_attrs for t in trials if t.state.name == "RUNNING" and "folder" in t.user_attrs]
    return {a["folder"]: int(a["worker"].split(":")[-2]) for a in attrs}


def until(found: Callable[[], Path | None]) -> Path:
    end = time.monotonic() + 60
    while (path := found()) is None:
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.02)
    return path


@pytest.mark.slow
def test_no_trial_is_lost_and_no_finished_one_repeated(tmp_path, request):
    for name, text in (("killed_runs.py", RUN), ("begin.py", SWEEP)):
        (tmp_path / name).write_text(textwrap.dedent(text))
    storage = f"sqlite:///{tmp_path}/study.db"
    space = {"strategy.lr": {"low": 0.01, "high": 0.1, "log": True}}
    section = {"trials": 5, "grace_seconds": 10_000, "storage": storage, "space": space}
    loop = {"max_epochs": 6, "batch_size": 16, "checkpoint_every": 40}
    stream = {"name": "digits", "validation": 0.2}
    path = write(tmp_path, section, stream=stream, loop=loop, tracking={"enabled": False})
    folder, killed = tmp_path / "runs" / "demo", []
    command = [sys.executable, tmp_path / "begin.py", path]
    begun = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    request.addfinalizer(begun.kill)

    def kill(run: Path) -> None:
        """The worker whose run this is, with what is finished by now."""
        name, pid = run.parent.name, owners(storage)[run.parent.name]
        os.kill(pid, signal.SIGKILL)
        killed.append(name)

    def first(*marks: str, without: str) -> Callable[[], Path | None]:
        """A run, of a trial under way and not killed yet, whose folder holds all of `marks` and not `without`."""

        def look() -> Path | None:
            runs = (f for f in folder.glob("trial-*/seed-0") if f.parent.name not in killed)
            there = (f for f in runs if all(list(f.glob(m)) for m in marks) and not (f / without).exists())
            return next((f for f in there if f.parent.name in owners(storage)), None)

        return look

    kill(until(first("begun", without="metrics.jsonl")))  # it has hardly begun
    kill(until(first("checkpoints/*/*", without="summary.json")))  # in the middle
    kill(until(first("ended", without="nothing")))  # its run is complete, and the study does not know
    done = {f: f.stat().st_mtime_ns for f in folder.glob("*/*/summary.json")}
    out, err = begun.communicate(timeout=120)
    assert begun.returncode == 0, err
    assert err.count("a worker ended (killed by SIGKILL); another goes on with its trial") == 3
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [t["state"] for t in trials].count("complete") == 5
    assert [t["folder"].rpartition("/")[2] for t in trials if t["state"] == "fail"] == sorted(killed)
    assert {f: f.stat().st_mtime_ns for f in done} == done  # no finished run has been touched
    history = {f.parent.parent.name: f.read_text().split() for f in folder.glob("*/*/begun")}
    assert history[killed[1]] == ["new", "resumed"]
    assert {name: len(times) for name, times in history.items()} == {name: 1 + (name in killed) for name in history}
    assert out.count("\ntrial ") + out.startswith("trial ") == 5
