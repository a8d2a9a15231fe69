"""Killed while it acts, a run goes on with every transition once, and ends as if it had not been killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_interaction import assert_same, config, outcome

TESTS = Path(__file__).parents[1]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}

# Kills itself at the given call of `act`: of the explorer, or of the evaluation that follows.
KILLER = """
import os, signal, sys
from clplat.cli import main
from clplat.config import discovery
cls, explores, countdown = discovery.load("strategies", "sac"), sys.argv[1] == "explore", int(sys.argv[2])
act = cls.act

def counted(self, observation, explore):
    global countdown
    countdown -= explore == explores
    if countdown == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return act(self, observation, explore)

if countdown:
    cls.act = counted
sys.exit(main(sys.argv[3:]))
"""


def command(kind: str, count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", KILLER, kind, str(count), *arguments], capture_output=True, text=True,
                          timeout=200, env=ENVIRONMENT)  # fmt: skip


def only_run(folder: Path) -> Path:
    (found,) = (folder / "acting").iterdir()
    return found


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("straight")
    done = command("explore", 0, "run", written(folder), "--quiet")
    assert done.returncode == 0, done.stderr
    return outcome(only_run(folder))


def written(folder: Path) -> str:
    path = folder / "acting.yaml"
    path.write_text(yaml.safe_dump(config(folder)))
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"), [("explore", 20), ("explore", 130), ("explore", 215), ("evaluate", 290), ("evaluate", 900)]
)
def test_killed_while_acting_it_resumes_exactly(kind: str, count: int, straight: Any, tmp_path: Path) -> None:
    """Before the first update, after it, in the second episode, in episodes of evaluation."""
    killed = command(kind, count, "run", written(tmp_path), "--quiet")
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = command("explore", 0, "run", "--resume", str(only_run(tmp_path)), "--quiet")
    assert again.returncode == 0, again.stderr
    assert_same(outcome(only_run(tmp_path)), straight)
