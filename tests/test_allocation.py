"""A process keeps the memory that it frees, unless it is told what to keep."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")

FAULTS = """
import resource, sys
import torch
from clplat.run.allocation import keep_freed

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

kept = keep_freed() if sys.argv[1] == "asked" else False
for _ in range(20):  # 64 MB; what is left between them at first is kept apart, some seven times
    torch.ones(2**24)
before = faults()
for _ in range(4):
    torch.ones(2**24)
print(kept, faults() - before)
"""


def faults(asked: str, **told: str) -> tuple[str, int]:
    """Whether a new process says that it keeps its memory, and the pages it is given for four tensors of 64 MB."""
    given = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))} | told
    command = [sys.executable, "-c", FAULTS, asked]
    kept, pages = subprocess.run(command, env=given, capture_output=True, text=True, check=True).stdout.split()
    return kept, int(pages)


@glibc
def test_freed_memory_is_used_again() -> None:
    assert faults("asked")[1] < 1_000 < 60_000 < faults("not asked")[1]


@glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_a_process_that_is_told_what_to_keep_is_left_alone(name: str) -> None:
    kept, pages = faults("asked", **{name: "131072"})
    assert kept == "False"
    assert pages > 60_000
