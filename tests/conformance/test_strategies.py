"""Every strategy that is discovered goes through every check of `clplat.testing`."""

import os
from functools import cache
from pathlib import Path

import pytest
from rings import SECOND_RING

import clplat
from clplat.config import discovery
from clplat.testing import CHECKS, Subject, judge
from clplat.testing.checks_of_processes import compare, in_processes

KNOWN = 9  # strategies when this was last looked at; there can only be more
FILES = [f for f in (Path(clplat.__file__).parent / "strategies").glob("*.py") if not f.stem.startswith("_")]
# What the second ring goes through with every change; the rest in the slow part, since the fast one has ten minutes.
QUICK = {"hooks"}
NAMES = sorted(name for name, e in discovery.entries("strategies").items() if e.qualname.startswith("clplat."))


@pytest.fixture(autouse=True, scope="module")
def _environment():
    """Libraries that a strategy brings along set variables when they are first imported."""
    before = dict(os.environ)
    for name in NAMES:
        _ = subject(name).backbone
    yield
    os.environ.clear()
    os.environ.update(before)


@cache
def subject(name):
    """One for all checks, which share its plain run."""
    return Subject(name)


@cache
def two_processes():
    return in_processes(NAMES)


def test_none_is_left_out():
    assert sorted(f.stem for f in FILES) == NAMES
    assert len(NAMES) >= KNOWN


def test_the_second_ring_is_known():
    assert set(NAMES) >= SECOND_RING
    assert set(CHECKS) >= QUICK


def asked():
    for name in NAMES:
        for check in (c for c in CHECKS if c != "processes"):
            later = name in SECOND_RING and check not in QUICK
            yield pytest.param(name, check, marks=[pytest.mark.slow] * later)


@pytest.mark.parametrize(("name", "check"), list(asked()))
def test_conforms(name, check):
    result = judge(subject(name), check)
    assert result.status != "failed", result.message
    if result.status == "not applicable":
        pytest.skip(result.message)


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_equal_one(name):
    result = judge(subject(name), "processes", lambda s: compare(s, two_processes()[s.name]))
    assert result.status != "failed", result.message
    if result.status == "not applicable":
        pytest.skip(result.message)
