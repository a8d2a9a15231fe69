"""The fast tests of numbers hold on other processors: older instruction sets, more threads, other roundings and seeds.

Libraries are told by their own variables to compute as on an older processor; `rounding` plays one that rounds
otherwise.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NUMBERS = (
    "strategies",
    "adapters",
    "backbones/test_cnn.py",
    "test_ridge.py",
    "test_ridge_forgetting.py",
    "test_augment.py",
    "test_ema.py",
    "test_heads.py",
)
LONG = ("families", "adapters_on_families", "wsrl_runs")  # whole runs, of numbers that the others have, too
# Seconds each, and no numbers of ours: imports, and networks of others whose accuracy was published.
OTHERS = "not does_not_import and not pretrained"
TRAINED = " and not request_erases_and_keeps"  # half a minute where each operation is caught
SETTINGS: dict[str, tuple[dict[str, str], str]] = {  # name: what the libraries are told, what torch then is
    "SSE, 1 thread": (
        {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41", "MKL_CBWR": "COMPATIBLE",
         "OPENBLAS_CORETYPE": "Nehalem", "OMP_NUM_THREADS": "1"}, "DEFAULT 1"),
    "AVX2, 2 threads, rounding otherwise": (
        {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2",
         "OPENBLAS_CORETYPE": "Haswell", "OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE",
         "PYTEST_PLUGINS": "rounding"}, "AVX2 2"),
}  # fmt: skip
# Kernels of a lower instruction set than was asked for would test nothing new, so torch is asked what it took.
RUN = """
import sys, pytest, torch
took = f"{torch.backends.cpu.get_cpu_capability()} {torch.get_num_threads()}"
assert took.endswith(sys.argv[1]), f"torch took {took}"
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the settings are those of x86 libraries")
@pytest.mark.parametrize(("seed", "name"), list(enumerate(SETTINGS, 1)), ids=list(SETTINGS))
def test_numbers_hold(seed: int, name: str, tmp_path: Path) -> None:
    told, took = SETTINGS[name]
    given = [
        "-q",
        "-p",
        "no:cacheprovider",
        "--tb=line",
        f"--hypothesis-seed={seed}",
        *("-k", OTHERS + TRAINED * ("rounding" in name)),
        f"--basetemp={tmp_path / 'inner'}",
        *(f"--ignore={TESTS / 'strategies' / f'test_{name}.py'}" for name in LONG),
    ]
    ended = subprocess.run(
        [sys.executable, "-c", RUN, took, *given, *(str(TESTS / part) for part in NUMBERS)],
        env={**os.environ, "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", **told},
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        timeout=880,
    )
    failed = re.findall(r"^(?:FAILED|ERROR) .*", ended.stdout, re.MULTILINE)
    said = f"{name} ({told}, --hypothesis-seed={seed}): " + "\n".join(
        failed or [ended.stdout[-2000:], ended.stderr[-2000:]]
    )
    assert ended.returncode == 0, said
    assert re.search(r"[1-9]\d{2,} passed", ended.stdout), said
