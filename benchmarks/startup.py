"""Seconds from the start of a process to the end of its first optimizer step, `clplat run` and the hand-written loop.

Both are fresh processes, started in turn; the clock is the system's monotonic one, which all processes share. One
unmeasured start of each comes first, so that no side pays for a cold disk.

By default clplat evaluates every test set before it trains, which the loop by hand does not: that is work, and no
overhead. So both are compared with `loop.evaluate: seen`, by which there is nothing to evaluate before the first
experience; what the first step of a ViT waits for with the default stands beside it, without a limit.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.timing import Row, paired

HERE = Path(__file__).parent


def clplat_command(model: str, strategy: str, output: str, *more: str) -> list[str]:
    """A command line of clplat for the same work as `benchmarks.hand`."""
    part = ["--strategy", strategy, "--strategy.lr", "0.1", "--stream", "digits", "--backbone", model]
    where = ["--head", "linear", "--fabric.accelerator", "cpu", "--output", f"{output}/runs", "--quiet"]
    return [sys.executable, "-m", "clplat", "run", *part, *where, *more]


def hand_command(model: str, method: str, epochs: int) -> list[str]:
    """A command line of the hand-written loop; 0 epochs: one step."""
    return [sys.executable, "-m", "benchmarks.hand", model, method, str(epochs)]


def environment() -> dict[str, str]:
    """One thread, and this folder's parent on the path."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}


def first_step(command: list[str]) -> float:
    """Seconds until the process says that its first step is done (its last line is the time)."""
    started = time.monotonic()
    done = subprocess.run(command, env=environment(), check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    return float(done.stdout.split()[-1]) - started


def rows(quick: bool = False) -> list[Row]:
    """One row for each model, with tracking on, as it is by default; another with test sets evaluated first."""
    found = []
    strategy = f"{HERE / 'first_step.py'}:FirstStep"
    for model, evaluate, limit in (("mlp", "seen", 1.0), ("vit_tiny", "seen", 1.0), ("vit_tiny", "all", None)):
        with tempfile.TemporaryDirectory() as folder:
            ours = clplat_command(model, strategy, folder, "--loop.evaluate", evaluate)
            sides = ours, hand_command(model, "naive", 0)
            for side in sides:
                first_step(side)
            pairs = [(first_step(sides[0]), first_step(sides[1])) for _ in range(1 if quick else 7)]
        mine, base = zip(*pairs, strict=True)
        first = ", all test sets evaluated before" if evaluate == "all" else ""
        found.append(paired(f"first step, {model}{first}", "s", mine, base, "difference", limit))
    return found
