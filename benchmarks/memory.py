"""Peak resident memory of a whole run in a fresh process and its children, next to the hand-written loop's process.

A run that is tracked is compared with a loop that logs its losses to the same kind of store: most of what tracking
takes is MLflow itself. The distance to the loop that tracks nothing is in the note.

The process's own peak is the kernel's high-water mark. Children are added by their share (PSS) at the moment of the
largest sum; a child counts once it runs a program of its own, since until then it shares its parent's pages.
"""

from __future__ import annotations

import statistics
import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

from benchmarks.startup import clplat_command, environment, hand_command
from benchmarks.timing import Row, paired

LIMIT_MB, EPOCHS, PAUSE_SECONDS = 150.0, 2, 0.02


def peak_mb(command: list[str]) -> tuple[float, float]:
    """Megabytes (10^6 bytes) at the peak of the process, and of it and its children together."""
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    own, children = 0.0, 0.0
    parent = psutil.Process(process.pid)
    while process.poll() is None:
        with suppress(OSError, psutil.Error):
            own = max(own, _high_water(process.pid))
            children = max(children, _of_children(parent))
        time.sleep(PAUSE_SECONDS)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return own, own + children


def _high_water(pid: int) -> float:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(line.split()[1]) * 1024 / 1e6 for line in lines if line.startswith("VmHWM"))  # none once it ended


def _of_children(parent: psutil.Process) -> float:
    own = parent.cmdline()
    found = [c for c in parent.children(recursive=True) if c.cmdline() != own]
    return sum(c.memory_full_info().pss for c in found) / 1e6


def rows(quick: bool = False) -> list[Row]:
    """One row without and one with tracking to a new SQLite store; the report is written in both."""
    found, untracked = [], 0.0
    for tracked in (False, True):
        mine, base, alone = [], [], []
        for _ in range(1 if quick else 5):
            with tempfile.TemporaryDirectory() as folder:
                options = ["--loop.max_epochs", str(EPOCHS), "--tracking.enabled", str(tracked).lower()]
                own, whole = peak_mb(clplat_command("mlp", "naive", folder, *options))
                store = [f"sqlite:///{folder}/hand.db"] if tracked else []
                base.append(peak_mb([*hand_command("mlp", "naive", EPOCHS), *store])[1])
            alone.append(own)
            mine.append(whole)
        note = f"children {max(a - b for a, b in zip(mine, alone, strict=True)):.0f}"
        note += f"; {statistics.median(mine) - untracked:.0f} above the loop that tracks nothing" if tracked else ""
        untracked = untracked or statistics.median(base)
        name = f"peak memory, {'both tracking to SQLite' if tracked else 'neither tracking'}"
        found.append(paired(name, "MB", mine, base, "difference", LIMIT_MB, note))
    return found
