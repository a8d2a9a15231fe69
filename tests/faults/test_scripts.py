"""The scripts behind `make faults` find what they look for, and a few of their cases."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parents[1])}


@pytest.mark.parametrize(
    ("code", "said", "right"),
    [
        (0, "all well", True),
        (2, "a library's warning\nclplat: stream.path: no such file", True),
        (2, "something else", False),
        (1, "Traceback (most recent call last):\nValueError: no\n", False),
        (-9, "", False),
        (70, "clplat: a line", False),
    ],
)
def test_what_is_wrong(code: int, said: str, right: bool) -> None:
    assert (fuzz.wrong(code, said) is None) == right


def test_damage_is_drawn_from_its_seed_and_changes_something() -> None:
    content = bytes(range(256)) * 8
    found = [fuzz.damaged(content, random.Random(seed)) for seed in range(40)]
    assert found == [fuzz.damaged(content, random.Random(seed)) for seed in range(40)]
    assert sum(f == content for f in found) < 4
    assert len(set(found)) > 30


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments"),
    [("kills.py", ("--cases", "3", "--only", "er")), ("fuzz.py", ("--cases", "5", "--only", "jsonl"))],
)
def test_a_few_cases(script: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    command = [sys.executable, str(HERE / script), *arguments, "--workers", "1", "--output", str(tmp_path / "found")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=ENVIRONMENT)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "found").read_text())
    assert found["cases"] == int(arguments[1])
    assert found["faults"] == {}
    assert found.get("kills", 3) >= 3
