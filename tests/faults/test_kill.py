"""Killed at any moment, a resumed run ends as the uninterrupted one; and other ways in which a run is stopped."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from mixed import mixed_config
from thorough import halved

from clplat.run import checkpoint

# The command line in a fresh process, with a signal sent to itself at a chosen event. Events are counted over the
# whole run: an index into data, a backward pass, an evaluation batch, a file flushed within a checkpoint, a rename; a
# flush of the thread that writes while the loop goes on, which is slow then, and is given a checkpoint at every third
# step: by the clock, a busy machine would write fewer than are counted.
KILLER = """
import os, sys
import torch
torch.set_num_threads(1)
event, countdown, number = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])

def counted(owner, name):
    original = getattr(owner, name)
    def wrapper(*args, **kwargs):
        global countdown
        countdown -= 1
        if countdown == 0:
            os.kill(os.getpid(), number)
        return original(*args, **kwargs)
    setattr(owner, name, wrapper)

from clplat import files, stream
from clplat.run import checkpoint
from clplat.run.evaluation import Evaluator
if event == "load":
    import clplat.run.build
    counted(clplat.run.build.discovery, "load")
elif event == "data":
    counted(stream.Data, "batch")
elif event == "backward":
    counted(torch.Tensor, "backward")
elif event == "evaluate":
    counted(Evaluator, "__call__")
elif event == "flush":
    counted(os, "fsync")
elif event == "rename":
    counted(os, "replace")
elif event == "writing":
    import threading, time
    from clplat.run import saving
    saving._affordable = lambda run, least=0.0: run.progress.steps % 3 == 0
    fsync = os.fsync
    counted(os, "fsync")
    beside = os.fsync
    def flush(handle):
        if threading.current_thread() is threading.main_thread():
            return fsync(handle)
        time.sleep(0.002)
        return beside(handle)
    os.fsync = flush
from clplat.cli import main
sys.exit(main(sys.argv[4:]))
"""

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}


def command(event: str, count: int, number: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLER, event, str(count), str(int(number)), *arguments],
        capture_output=True, text=True, timeout=120, env=ENVIRONMENT,
    )  # fmt: skip


def write_config(folder: Path, **loop: Any) -> Path:
    config = mixed_config(folder / "runs")
    config["loop"] |= {"checkpoint_every": 4, **loop}
    path = folder / "mixed.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def only_run(folder: Path) -> Path:
    found = list((folder / "runs").glob("mixed/*"))
    assert len(found) == 1
    return found[0]


def result(run_dir: Path) -> dict[str, Any]:
    """The summary without what differs between any two runs: time and memory."""
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "complete"
    del summary["git_commit"]  # of the checkout, which may move on while this runs
    flops = summary.pop("cost")["train_flops"]
    return summary | {"train_flops": flops}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("straight")
    done = command("none", 0, 0, "run", str(write_config(folder)), "--quiet")
    assert done.returncode == 0, done.stderr
    return result(only_run(folder))


def moments() -> list[tuple[str, int]]:
    """Twenty moments drawn over all kinds of event; the seed keeps a failure repeatable."""
    draw = random.Random(20)
    limits = {"load": 4, "data": 90, "backward": 110, "evaluate": 20, "flush": 150, "rename": 60}
    events = [*limits, *draw.choices(list(limits), k=14)]
    return [(event, draw.randint(1, limits[event])) for event in events]


@pytest.mark.slow
@pytest.mark.parametrize(("event", "count"), halved(moments()))
def test_killed_run_resumes_exactly(event: str, count: int, tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    config = str(write_config(tmp_path))
    killed = command(event, count, signal.SIGKILL, "run", config, "--quiet")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    if event == "load":  # the parts are built before there is a folder: nothing to resume, nothing left behind
        assert not (tmp_path / "runs").exists()
        again = command("none", 0, 0, "run", config, "--quiet")
    else:
        again = command("none", 0, 0, "run", "--resume", str(only_run(tmp_path)), "--quiet")
    run_dir = only_run(tmp_path)
    assert again.returncode == 0, again.stderr
    assert result(run_dir) == uninterrupted
    assert not list(run_dir.rglob("*.part"))


def killed_and_resumed(folder: Path, event: str, count: int, seconds: float, uninterrupted: dict[str, Any]) -> None:
    """A run that is saved by time, killed and gone on with, ends as the one that was not."""
    config = str(write_config(folder, checkpoint_every=None, checkpoint_seconds=seconds))
    killed = command(event, count, signal.SIGKILL, "run", config, "--quiet")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = command("none", 0, 0, "run", "--resume", str(only_run(folder)), "--quiet")
    assert again.returncode == 0, again.stderr
    finished, expected = result(only_run(folder)), dict(uninterrupted)
    finished.pop("config_sha256"), expected.pop("config_sha256")  # the checkpoint interval differs on purpose
    assert finished == expected


@pytest.mark.slow
@pytest.mark.parametrize("count", halved([3, 6, 8, 22, 25, 34, 41]))
def test_killed_while_a_checkpoint_is_written_beside_the_loop_resumes_exactly(
    count: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """Whatever the loop has done meanwhile: steps, lines of the log, the ledger."""
    killed_and_resumed(tmp_path, "writing", count, 0.001, uninterrupted)
    assert not list(only_run(tmp_path).rglob("*.part"))


@pytest.mark.slow
@pytest.mark.parametrize("count", [60, 105])
def test_killed_where_ends_of_experiences_were_not_worth_a_checkpoint_resumes_exactly(
    count: int, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    """By the default interval: what is lost is several experiences, a log and a ledger that say they are done."""
    killed_and_resumed(tmp_path, "backward", count, 60, uninterrupted)


@pytest.mark.slow
def test_killed_twice_in_a_row_resumes_exactly(tmp_path: Path, uninterrupted: dict[str, Any]) -> None:
    command("backward", 50, signal.SIGKILL, "run", str(write_config(tmp_path)), "--quiet")
    run_dir = only_run(tmp_path)
    for _ in range(2):
        killed = command("backward", 20, signal.SIGKILL, "run", "--resume", str(run_dir), "--quiet")
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert command("none", 0, 0, "run", "--resume", str(run_dir), "--quiet").returncode == 0
    assert result(run_dir) == uninterrupted


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_exits_130_and_resumes_exactly(
    number: signal.Signals, tmp_path: Path, uninterrupted: dict[str, Any]
) -> None:
    stopped = command("backward", 30, number, "run", str(write_config(tmp_path, checkpoint_every=None)), "--quiet")
    assert stopped.returncode == 130, stopped.stderr
    assert "Traceback" not in stopped.stderr
    run_dir = only_run(tmp_path)
    assert json.loads((run_dir / "summary.json").read_text())["status"] == "interrupted"
    again = command("none", 0, 0, "run", "--resume", str(run_dir), "--quiet")
    assert again.returncode == 0, again.stderr
    finished, expected = result(run_dir), dict(uninterrupted)
    finished.pop("config_sha256"), expected.pop("config_sha256")  # the checkpoint interval differs on purpose
    assert finished == expected


@pytest.mark.slow
def test_second_process_on_the_same_run_is_refused(tmp_path: Path) -> None:
    path = write_config(tmp_path, max_epochs=2000)
    first = subprocess.Popen(
        [sys.executable, "-m", "clplat.cli", "run", str(path), "--quiet"], env=ENVIRONMENT, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("runs/mixed/*/checkpoints/0*")):
            assert first.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        second = command("none", 0, 0, "run", "--resume", str(only_run(tmp_path)), "--quiet")
        assert second.returncode == 2
        assert "in use by another process" in second.stderr
        assert "Traceback" not in second.stderr
        first.send_signal(signal.SIGINT)
        assert first.wait(30) == 130
    finally:
        first.kill()
        first.communicate()


# --- requests to forget -----------------------------------------------------------------------------------------------


BASE = {"experiences": 2, "train_per_class": 12}


def write_requests(folder: Path) -> Path:
    """Digits with a class to forget, then samples; the class taught once more, and forgotten."""
    requests = ["class:1", ["sample:3", "sample:5"], {"learn": "class:1"}, "class:1"]
    config: dict[str, Any] = {
        "name": "mixed",
        "strategy": {"name": "random_labels", "memory": 20, "replay_batch": 4},
        "stream": {
            "name": "unlearning",
            "requests": requests,
            "base_options": BASE,
        },
        "backbone": {"name": "mlp", "hidden": [16]},
        "loop": {"max_epochs": 3, "batch_size": 8, "checkpoint_every": 2, "checkpoint_seconds": None},
        "tracking": {"enabled": False},
        "output": str(folder / "runs"),
    }
    path = folder / "requests.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def entries(run_dir: Path) -> list[dict[str, Any]]:
    """The ledger without times."""
    timed = ("started", "finished", "seconds")
    return [{k: v for k, v in e.items() if k not in timed} for e in json.loads((run_dir / "ledger.json").read_text())]


def weights(run_dir: Path) -> dict[str, Any]:
    """The learner in the last checkpoint."""
    state, notes = checkpoint.load_newest(run_dir / "checkpoints")
    assert state is not None
    assert not notes
    return state["strategy"]


@pytest.fixture(scope="module")
def uninterrupted_requests(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("requests")
    done = command("none", 0, 0, "run", str(write_requests(folder)), "--quiet")
    assert done.returncode == 0, done.stderr
    return only_run(folder)


# Backward passes 1 to 48 learn; 49 to 54 erase a class, 57 to 59 samples, 63 to 68 teach the class again, 69 to 74
# erase it; those between are of the audit. Files are flushed and renamed for the ledger and the checkpoints of the
# first request from 151 to 190 and from 62 to 78.
REQUESTED = [
    *(("backward", n) for n in (49, 51, 54, 58, 66, 72)),
    *(("flush", n) for n in (151, 178)),
    *(("rename", n) for n in (62, 74, 76)),
    ("data", 70),
]


@pytest.mark.slow
@pytest.mark.parametrize(("event", "count"), halved(REQUESTED))
def test_killed_within_a_request_resumes_exactly(
    event: str, count: int, tmp_path: Path, uninterrupted_requests: Path
) -> None:
    """A request is never half applied: summary, ledger and every tensor end as those of the run that was not killed."""
    config = str(write_requests(tmp_path))
    killed = command(event, count, signal.SIGKILL, "run", config, "--quiet")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_dir = only_run(tmp_path)
    again = command("none", 0, 0, "run", "--resume", str(run_dir), "--quiet")
    assert again.returncode == 0, again.stderr
    assert result(run_dir) == result(uninterrupted_requests)
    assert entries(run_dir) == entries(uninterrupted_requests)
    assert_same(weights(run_dir), weights(uninterrupted_requests))
    assert not list(run_dir.rglob("*.part"))


def assert_same(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b
