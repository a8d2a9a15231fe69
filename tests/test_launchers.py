"""Several runs at a time: the same figures as in turn, by each launcher; stopped, killed and gone on with; refused."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import pytest
from sweeping import write

from clplat.cli import main
from clplat.launchers.local import devices
from clplat.sweep.study import sweep

RUN = ["run", "--strategy", "er", "--stream", "digits", "--tracking.enabled", "false", "--name", "grid"]
SHORT = [*RUN, "--loop.max_epochs", "1", "--seeds", "0,1"]
LONG = [*RUN, "--loop.max_epochs", "120", "--loop.checkpoint_every", "20", "--seeds", "0,1"]
TIMES = ("train_seconds", "eval_seconds", "total_seconds")


def figures(folder: Path) -> dict[int, object]:
    """Metrics of the complete runs there, by seed."""
    found = {}
    for file in folder.glob("runs/grid/*/summary.json"):
        summary = json.loads(file.read_text())
        assert summary["status"] == "complete"
        assert summary["seed"] not in found
        found[summary["seed"]] = (summary["metrics"], summary["accuracy_matrix"])
    return found


def command(folder: Path, *words: str, python: Sequence[str] = ("-m", "clplat")) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    return subprocess.Popen(
        [sys.executable, *python, *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip


def whole(folder: Path, *words: str, python: Sequence[str] = ("-m", "clplat")) -> str:
    process = command(folder, *words, python=python)
    try:
        said = process.communicate(timeout=200)[0]
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, said
    return said


def workers(process: subprocess.Popen[str]) -> list[int]:
    asked = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(process.pid)]
    listed = subprocess.run(asked, capture_output=True, text=True, check=False)
    return [int(line.split()[0]) for line in listed.stdout.splitlines() if "spawn_main" in line]


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


@pytest.fixture(scope="module")
def in_turn(tmp_path_factory):
    folder = tmp_path_factory.mktemp("turn")
    whole(folder, *SHORT)
    return figures(folder)


def as_in_turn(folder: Path, in_turn, said: str) -> None:
    assert figures(folder) == in_turn
    assert (folder / "runs/grid/comparison/report.html").is_file()
    assert "[2/2] grid, seed 1: " in said


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_processes_give_what_runs_in_turn_give(in_turn, tmp_path):
    as_in_turn(tmp_path, in_turn, whole(tmp_path, *SHORT, "--jobs", "2"))
    assert "2 of 2 runs are complete already" in whole(tmp_path, *SHORT, "--jobs", "2")
    assert figures(tmp_path) == in_turn


def tasks_of_submitit(folder: Path) -> list[int]:
    """Processes in which submitit does a job that was given out in this folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (
                b"submitit.core._submit" in (process / "cmdline").read_bytes()
                and (process / "cwd").readlink() == folder
            ):
                found.append(int(process.name))
    return found


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
def test_jobs_that_slurm_takes_away_are_queued_again_and_go_on(in_turn, tmp_path):
    """Simulated: submitit's own queue on this machine, and the signal that it has SLURM send before a preemption."""
    words = ["--launcher", "slurm", "--jobs", "2", "--resource", "cluster=local", "--loop.checkpoint_every", "3"]
    process = command(tmp_path, *SHORT, *words)
    wait_for(lambda: len({f.parents[1] for f in tmp_path.glob("runs/grid/*/checkpoints/0*")}) == 2)
    for pid in tasks_of_submitit(tmp_path):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGUSR2)
    said = process.communicate(timeout=200)[0]
    assert process.returncode == 0, said
    assert "Requeued job" in "".join(f.read_text() for f in tmp_path.glob("runs/slurm/*_log.out"))
    as_in_turn(tmp_path, in_turn, said)


TAKEN = """
    import os, signal, time
    from pathlib import Path

    def run(config, run_dir):
        first = not run_dir.exists()
        run_dir.mkdir(parents=True, exist_ok=True)
        if first:
            os.kill(os.getpid(), signal.SIGUSR2)
            time.sleep(60)
        return {"metrics": {"average_accuracy": 0.5}}
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.skipif(find_spec("submitit") is None, reason="submitit is not installed")
def test_a_worker_that_slurm_takes_away_gives_its_trial_back_and_goes_on(tmp_path, monkeypatch, capsys):
    (tmp_path / "taken.py").write_text(textwrap.dedent(TAKEN))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    import taken

    path = write(tmp_path, {"trials": 1, "grace_seconds": 10_000})
    result = sweep(path, launcher="slurm", resources={"cluster": "local"}, run=taken.run, quiet=True)
    assert [(t["state"], t["repeat_of"]) for t in result.trials] == [("complete", 0)]
    assert capsys.readouterr().err.count("submitted 1 jobs") == 1  # it is not another job that goes on


# One session serves runs and a sweep, in which one worker is killed and two are asked to stop, as by their machines.
SESSION = """
    import os, signal, sys, threading, time
    from clplat.cli import main
    from clplat.launchers.ray import session
    from clplat.sweep.study import perform, sweep

    def end(number, run_dir):
        while not list(run_dir.glob("checkpoints/0*")):
            time.sleep(0.005)
        os.kill(os.getpid(), number)

    def run(config, run_dir):
        moments = {"trial-0000": signal.SIGKILL, "trial-0001": signal.SIGTERM, "trial-0002": signal.SIGTERM}
        number = moments.get(run_dir.parent.name)
        if number and not run_dir.exists():
            threading.Thread(target=end, args=[number, run_dir], daemon=True).start()
        return perform([], config, run_dir)

    if __name__ == "__main__":
        with session() as ray:
            assert main(sys.argv[2:]) == 0
            sweep(sys.argv[1], workers=2, launcher="ray", run=run)
        assert not ray.is_initialized()
        sweep(sys.argv[1], ["--sweep.study", "here"])
"""


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.skipif(find_spec("ray") is None, reason="ray is not installed")
def test_one_session_of_ray_serves_runs_and_a_sweep(in_turn, tmp_path):
    (tmp_path / "begin.py").write_text(textwrap.dedent(SESSION))
    space = {"strategy.lr": {"choices": [0.01, 0.03, 0.1, 0.3]}, "loop.batch_size": {"choices": [16, 32]}}
    section = {"trials": 8, "sampler": "grid", "space": space, "grace_seconds": 10_000}
    loop, stream = {"max_steps": 40, "checkpoint_every": 4}, {"name": "digits", "experiences": 2, "validation": 0.2}
    path = write(tmp_path, section, stream=stream, loop=loop, tracking={"enabled": False})
    words = ["--launcher", "ray", "--jobs", "2"]
    said = whole(tmp_path, *SHORT, *words, python=[str(tmp_path / "begin.py"), str(path)])
    as_in_turn(tmp_path, in_turn, said)
    over_ray, here = (json.loads((tmp_path / f"runs/{s}/sweep.json").read_text()) for s in ("demo", "here"))
    assert sorted(t["state"] for t in over_ray["trials"]) == ["complete"] * 8 + ["fail"]
    assert said.count("another goes on with its trial") == 1

    def found(study):
        return {tuple(sorted(t["params"].items())): t["value"] for t in study["trials"] if t["state"] == "complete"}

    assert found(over_ray) == found(here)
    assert len(found(here)) == 8
    assert over_ray["best"]["params"] == here["best"]["params"]


def both_begun(folder):
    """Whether two runs have a checkpoint each; one of them may have several by then."""
    return len({found.parent for found in folder.glob("runs/grid/*/checkpoints/0*")}) == 2


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_stop_and_a_killed_process_lose_nothing(tmp_path):
    process = command(tmp_path, *LONG, "--jobs", "2")
    wait_for(lambda: both_begun(tmp_path))
    held = workers(process)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    assert "run: stopped with 0 of 2 runs complete: the same command goes on here" in said
    assert not any(Path(f"/proc/{pid}").exists() for pid in held)
    process = command(tmp_path, *LONG, "--jobs", "2")
    os.kill(wait_for(lambda: workers(process))[0], signal.SIGKILL)
    said = process.communicate(timeout=280)[0]
    assert process.returncode == 0, said
    assert "2 of 2 runs are gone on with" in said
    assert "a process ended by SIGKILL; another goes on" in said
    assert sorted(figures(tmp_path)) == [0, 1]


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_processes_end_with_a_killed_parent(tmp_path):
    process = command(tmp_path, *LONG, "--jobs", "2")
    wait_for(lambda: both_begun(tmp_path))
    held = workers(process)
    assert len(held) == 2
    process.kill()
    process.communicate()
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in held), 30)


FAKE = """#!/bin/sh
echo "$@" > {0}/told
cp "$1" {0}/script
echo "Submitted batch job 77"
"""


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("what", ["runs", "sweep"])
def test_what_sbatch_is_told(what, tmp_path):
    """A fake one, which starts nothing: what it is given is looked at, and no job of SLURM's has been run here."""
    if find_spec("submitit") is None:
        pytest.skip("submitit is not installed")
    (tmp_path / "bin").mkdir()
    for name, text in {"sbatch": FAKE.format(tmp_path), "srun": "", "scancel": f"echo $@ > {tmp_path}/gone",
                       "sacct": "echo 'JobID|State\n77_0|PENDING\n77_1|PENDING'"}.items():  # fmt: skip
        file = tmp_path / "bin" / name
        file.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n")
        file.chmod(0o755)
    told = ["timeout_min=90", "slurm_partition=gpu", "gpus_per_node=1"]
    folder = tmp_path / "here"
    folder.mkdir()
    studied = ["sweep", str(write(folder, stream={"name": "digits", "validation": 0.2})), "--workers", "2"]
    words = [*SHORT, "--jobs", "2"] if what == "runs" else studied
    words += ["--launcher", "slurm", *(w for r in told for w in ("--resource", r))]
    process = subprocess.Popen(
        [sys.executable, "-m", "clplat", *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    wait_for((tmp_path / "script").is_file)
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 130, said
    script = (tmp_path / "script").read_text()
    for line in ("--array=0-1%2", "--partition=gpu", "--gpus-per-node=1", "--time=90", "--signal=USR2@"):
        assert f"#SBATCH {line}" in script
    assert "submitit.core._submit" in script
    assert (tmp_path / "gone").read_text().startswith("77")


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        (["--jobs", "0"], "jobs: 0 is out of range (valid: ≥ 1)"),
        (["--launcher", "pbs"], "launcher: 'pbs' is not known (valid: local, slurm, ray)"),
        (["--jobs", "2", "--resource", "num_cpus"], "resource: 'num_cpus' is not KEY=VALUE"),
        (["--jobs", "2", "--resource", "num_cpus=1"], "resource: local knows no num_cpus (valid: none"),
        (["--launcher", "ray", "--resource", "gpus=1"], "resource: ray knows no gpus (valid: address, num_cpus, num_"),
        (["--jobs", "2", "--dry-run"], "launcher: a dry run is done here"),
        (["--jobs", "2", "--resource", "a=[1"], "resource: a: '[1' is not YAML"),
    ],
)
def test_what_can_t_be_is_refused_in_a_line(words, fault, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*SHORT, *words]) == 2
    said = capsys.readouterr().err
    assert fault in said
    assert len(said.splitlines()) <= 2
    assert not list(tmp_path.glob("runs/grid/2*"))


def test_gpus_are_those_that_are_told_or_listed(tmp_path):
    assert devices({"CUDA_VISIBLE_DEVICES": "2,GPU-ab"}) == ["2", "GPU-ab"]
    assert devices({"CUDA_VISIBLE_DEVICES": ""}) == []
    assert devices({"PATH": str(tmp_path)}) == []
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'GPU 0: A (UUID: GPU-1)'\necho '  MIG 1g'\necho 'GPU 1: A (UUID: GPU-2)'\n")
    tool.chmod(0o755)
    assert devices({"PATH": f"{tmp_path}:{os.environ['PATH']}"}) == ["0", "1"]
