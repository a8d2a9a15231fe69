"""Streams of 10, 100 and 1,000 experiences: permuted digits, five steps of an MLP each, scored on its own test set.

Each run is a process of its own. What a run costs should grow with the number of its experiences and no faster, so the
time and disk of an experience in a long stream stand next to those in a short one. Time counts from the first line of
the log to the last.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from benchmarks.memory import peak_mb
from benchmarks.timing import Row, paired

SHORT, LENGTHS, LIMIT = 10, (100, 1_000), 1.5


def command(experiences: int, output: str, evaluate: str) -> list[str]:
    """A run over so many."""
    options = {"strategy": "naive", "backbone": "mlp", "stream": "digits", "stream.scenario": "permuted",
               "stream.experiences": experiences, "loop.max_steps": 5, "loop.evaluate": evaluate, "output": output,
               "tracking.enabled": False, "loop.representation": False}  # fmt: skip
    return [sys.executable, "-m", "clplat", "run", "-q", *(f"--{k}={v}" for k, v in options.items())]


def cost(experiences: int, evaluate: str) -> dict[str, float]:
    """Seconds, kB of its folder and of its report, each an experience; and peak memory in MB."""
    with tempfile.TemporaryDirectory() as folder:
        peak = peak_mb(command(experiences, folder, evaluate))[0]
        (run,) = (f.parent for f in Path(folder).rglob("summary.json"))
        log = (run / "metrics.jsonl").read_text().splitlines()
        spent = json.loads(log[-1])["time"] - json.loads(log[0])["time"]
        size = sum(f.stat().st_size for f in run.rglob("*") if f.is_file())
        report = (run / "report.html").stat().st_size
    return {
        "s": spent / experiences,
        "kB": size / 1000 / experiences,
        "report": report / 1000 / experiences,
        "MB": peak,
    }


def rows(quick: bool) -> list[Row]:
    """An experience of a long stream next to one of a short stream."""
    found, rounds = [], 1 if quick else 3
    for length in (30,) if quick else LENGTHS:
        pairs = [(cost(length, "last"), cost(SHORT, "last")) for _ in range(rounds)]
        for key, name, limit in (("s", "time", LIMIT), ("kB", "folder", LIMIT), ("report", "report.html", LIMIT)):
            unit = {"s": "s"}.get(key, "kB")
            of = ([p[side][key] for p in pairs] for side in (0, 1))
            found.append(paired(f"{name} of an experience, {length} next to {SHORT}", unit, *of, "ratio", limit))
        of = ([p[side]["MB"] for p in pairs] for side in (0, 1))
        found.append(paired(f"peak memory, {length} experiences next to {SHORT}", "MB", *of, "difference", 200.0))
    return found
