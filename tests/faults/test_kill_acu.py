"""Killed while sums are gathered, before they are solved, or within a request, a run ends as the uninterrupted one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from thorough import halved

import clplat

# The command line in a fresh process that kills itself when a function is entered for the n-th time.
KILLER = """
import importlib, os, signal, sys
import torch
torch.set_num_threads(1)
place, countdown = sys.argv[1], int(sys.argv[2])
module, _, path = place.partition(":")
owner = importlib.import_module(module)
*parents, name = path.split(".")
for parent in parents:
    owner = getattr(owner, parent)
original = getattr(owner, name)

def counted(*args, **kwargs):
    global countdown
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(*args, **kwargs)

setattr(owner, name, counted)
from clplat.cli import main
sys.exit(main(sys.argv[3:]))
"""

CONFIG: dict[str, Any] = {
    "name": "killed",
    "strategy": {"name": "acu", "width": 64},
    "stream": {
        "name": "unlearning",
        "base": "digits",
        "base_options": {"experiences": 2},
        "requests": [[f"sample:{r}" for r in range(120)], "class:3"],  # two batches, then one
    },
    "backbone": {"name": "mlp", "hidden": [30]},
    "loop": {"batch_size": 100, "checkpoint_every": 1, "representation": False},
    "tracking": {"enabled": False},
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(place: str, count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", KILLER, place, str(count), *arguments, "--quiet"],
        capture_output=True, text=True, timeout=280, env=ENVIRONMENT,
    )  # fmt: skip


def write(folder: Path, **strategy: Any) -> Path:
    known = CONFIG | {"output": str(folder / "runs"), "strategy": CONFIG["strategy"] | strategy}
    path = folder / "killed.yaml"
    path.write_text(yaml.safe_dump(known))
    return path


def only_run(folder: Path) -> Path:
    (found,) = (folder / "runs" / "killed").iterdir()
    return found


def end(run_dir: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """All tensors of the learner, and what was measured and noted, without times."""
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "complete"
    ledger = json.loads((run_dir / "ledger.json").read_text())
    events = ledger["events"] if isinstance(ledger, dict) else ledger
    noted = [{k: e[k] for k in ("index", "request", "samples", "rows_sha256", "outcome")} for e in events]
    return clplat.load(run_dir).state_dict(), (summary["accuracy_matrix"], noted)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, torch.Tensor], Any]:
    folder = tmp_path_factory.mktemp("straight")
    done = command("json:loads", 0, "run", str(write(folder)))
    assert done.returncode == 0, done.stderr
    return end(only_run(folder))


MOMENTS = {
    "gathering": ("clplat.components.ridge:Ridge.add", 5),
    "between gathering and solving": ("clplat.components.ridge:Ridge.solve", 2),
    "within the solve": ("clplat.components.ridge:Ridge._factor", 2),
    "at the second batch of a request": ("clplat.strategies.acu:ACU.forget_step", 2),
    "between a request's samples and its answer": ("clplat.components.ridge:Ridge.remove", 1),
    "between a request's factor and its sums": ("clplat.components.ridge:Ridge._commit", 1),
    "after the answer, before the checkpoint": ("clplat.run.checkpoint:write", 23),
    "in the second request": ("clplat.components.ridge:Ridge.remove", 2),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", halved(MOMENTS))
def test_killed_run_ends_with_the_uninterrupted_learner(
    moment: str, tmp_path: Path, uninterrupted: tuple[dict[str, torch.Tensor], Any]
) -> None:
    place, count = MOMENTS[moment]
    killed = command(place, count, "run", str(write(tmp_path)))
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    run_dir = only_run(tmp_path)
    again = command("json:loads", 0, "run", "--resume", str(run_dir))
    assert again.returncode == 0, again.stderr
    found, expected = end(run_dir), uninterrupted
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    for name, tensor in expected[0].items():
        assert torch.equal(torch.as_tensor(found[0][name]), torch.as_tensor(tensor)), name
