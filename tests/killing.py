"""A command of clplat that kills itself while an agent acts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
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
    """Killed at call `count` of `act`, when it explores or when it evaluates; 0: not at all."""
    return subprocess.run([sys.executable, "-c", KILLER, kind, str(count), *arguments], capture_output=True, text=True,
                          timeout=200, env=ENVIRONMENT)  # fmt: skip


def only_run(folder: Path) -> Path:
    """The folder of the one run of test_interaction's configuration below `folder`."""
    (found,) = (folder / "acting").iterdir()
    return found


def whole(path: str, folder: Path) -> Path:
    """The folder of the run of a configuration that writes below `folder`, not killed."""
    done = command("explore", 0, "run", path, "--quiet")
    assert done.returncode == 0, done.stderr
    return only_run(folder)


def killed(path: str, folder: Path, kind: str, count: int) -> Path:
    """As `whole`, killed once as `command` says and resumed."""
    done = command(kind, count, "run", path, "--quiet")
    assert done.returncode == -signal.SIGKILL, done.stderr
    again = command("explore", 0, "run", "--resume", str(only_run(folder)), "--quiet")
    assert again.returncode == 0, again.stderr
    return only_run(folder)
