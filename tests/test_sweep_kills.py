"""kill -9 of a worker at three moments: no trial is lost, no finished one is run again, and none waits for a beat."""

import json
import subprocess
import sys
import textwrap

import postgresql
import pytest
from sweeping import write

# Three of the trials are killed when first run: before anything of the run is there, in the middle of training, and
# when the run is complete and the study does not know yet.
RUN = """
    import contextlib, os, signal, threading, time
    from clplat.sweep.study import perform

    def kill():
        os.kill(os.getpid(), signal.SIGKILL)

    def kill_in_training(run_dir):
        while not list(run_dir.glob("checkpoints/*/*")):
            time.sleep(0.005)
        kill()

    def next_moment(run_dir):
        for moment in ("before", "training", "after"):
            with contextlib.suppress(FileExistsError):
                (run_dir.parents[1] / moment).mkdir()
                (run_dir / moment).touch()
                return moment

    def run(config, run_dir, *more):
        run_dir.mkdir(parents=True, exist_ok=True)
        first = not (run_dir / "begun").exists()
        with open(run_dir / "begun", "a") as file:
            file.write("resumed " if list(run_dir.glob("checkpoints/*/*")) else "new ")
        moment = next_moment(run_dir) if first else None
        if moment == "before":
            kill()
        if moment == "training":
            threading.Thread(target=kill_in_training, args=[run_dir], daemon=True).start()
        found = perform([], config, run_dir, *more)
        if first:
            (run_dir / "written").write_text(str((run_dir / "summary.json").stat().st_mtime_ns))
        if moment == "after":
            kill()
        return found
"""
SWEEP = """
    import sys, killed_runs
    from clplat.sweep.study import sweep

    if __name__ == "__main__":
        sweep(sys.argv[1], workers=2, run=killed_runs.run)
"""


@pytest.fixture(params=["journal", "sqlite", "postgresql"])
def storage(request, tmp_path):
    if request.param == "postgresql":
        with postgresql.server() as server:
            yield server.url()
    else:
        yield f"sqlite:///{tmp_path}/study.db" if request.param == "sqlite" else str(tmp_path / "study.log")


@pytest.mark.slow
def test_no_trial_is_lost_and_no_finished_one_repeated(tmp_path, storage):
    for name, text in (("killed_runs.py", RUN), ("begin.py", SWEEP)):
        (tmp_path / name).write_text(textwrap.dedent(text))
    space = {"strategy.lr": {"low": 0.01, "high": 0.1, "log": True}}
    loop = {"max_epochs": 6, "batch_size": 16, "checkpoint_every": 40}
    stream = {"name": "digits", "validation": 0.2}
    section = {"trials": 5, "grace_seconds": 10_000, "space": space, "storage": storage}
    path = write(tmp_path, section, stream=stream, loop=loop, tracking={"enabled": False})
    ended = subprocess.run([sys.executable, tmp_path / "begin.py", path], capture_output=True, text=True, timeout=500)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("a worker is gone (its process ended by SIGKILL); another goes on with its trial") == 3
    folder = tmp_path / "runs" / "demo"
    trials = json.loads((folder / "sweep.json").read_text())["trials"]
    assert [t["state"] for t in trials].count("complete") == 5
    before, training, after = (next(folder.glob(f"*/*/{m}")) for m in ("before", "training", "after"))
    failed = [t["folder"].rpartition("/")[2] for t in trials if t["state"] == "fail"]
    assert sorted(failed) == sorted(f.parent.parent.name for f in (before, training, after))
    history = {f.parent: f.read_text().split() for f in folder.glob("*/*/begun")}
    assert history.pop(before.parent) == ["new", "new"]
    assert history.pop(training.parent) == ["new", "resumed"]
    assert history.pop(after.parent) == ["new", "resumed"]  # and is not trained again:
    for mark in folder.glob("*/*/written"):
        assert mark.read_text() == str((mark.parent / "summary.json").stat().st_mtime_ns)
    assert set(map(tuple, history.values())) == {("new",)}
    assert ended.stdout.count("\ntrial ") + ended.stdout.startswith("trial ") == 5
