"""Every strategy that is discovered goes through every check of `clplat.testing`."""

import os
from functools import cache
from pathlib import Path

import pytest
from rings import SECOND_RING

import clplat
from clplat.commands import support
from clplat.config import discovery
from clplat.strategy import Strategy, why_not_sharded
from clplat.stream import Kind
from clplat.testing import CHECKS, Subject, judge
from clplat.testing.checks_of_processes import compare, go_on, in_processes

KNOWN = 9  # strategies when this was last looked at; there can only be more
FILES = [f for f in (Path(clplat.__file__).parent / "strategies").glob("*.py") if not f.stem.startswith("_")]
# What the second ring goes through with every change; the rest in the slow part, since the fast one has ten minutes.
QUICK = {"hooks"}
IN_TWO = {"processes": compare, "fewer_processes": go_on}
LATER = {"mixed", "accumulation"}
SUPPORT = {"resume", "mixed", "accumulation"}  # checks that are columns of the support matrix
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
    return in_processes([name for name in NAMES if subject(name).cls.kinds != {Kind.INTERACT}])


def test_none_is_left_out():
    assert sorted(f.stem for f in FILES) == NAMES
    assert len(NAMES) >= KNOWN


def test_the_second_ring_is_known():
    assert set(NAMES) >= SECOND_RING
    assert set(CHECKS) >= QUICK


def asked():
    for name in NAMES:
        for check in (c for c in CHECKS if c not in IN_TWO):
            later = check in LATER or (name in SECOND_RING and check not in QUICK)
            marks = [pytest.mark.slow] * later + [pytest.mark.support] * (check in SUPPORT)
            yield pytest.param(name, check, marks=marks)


@pytest.mark.parametrize(("name", "check"), list(asked()))
def test_conforms(name, check, seen):
    result = judge(subject(name), check)
    assert result.status != "failed", result.message
    if check in SUPPORT:
        seen(name, check, result.message)
    if result.status == "not applicable":
        pytest.skip(result.message)


@pytest.mark.slow
@pytest.mark.support
@pytest.mark.timeout(300)
@pytest.mark.parametrize("check", IN_TWO)
@pytest.mark.parametrize("name", NAMES)
def test_two_processes_and_one_that_goes_on_equal_one(name, check, seen):
    acts = subject(name).cls.kinds == {Kind.INTERACT}
    judged = None if acts else lambda s: IN_TWO[check](s, two_processes()[s.name])
    result = judge(subject(name), check, judged)
    assert result.status != "failed", result.message
    seen(name, check, result.message)
    if result.status == "not applicable":
        pytest.skip(result.message)


@pytest.mark.support
@pytest.mark.parametrize("name", [n for n in NAMES if why_not_sharded(discovery.load("strategies", n))])
def test_why_weights_are_not_sharded_is_recorded(name, seen):
    why = why_not_sharded(subject(name).cls)
    assert why != Strategy.unshardable
    seen(name, "fsdp", why)  # what is allowed test_sharded.py sees


def test_every_cell_of_the_support_matrix_is_recorded():
    rows = support.recorded()
    assert sorted(rows) == NAMES
    assert [(name, c) for name in NAMES for c in support.COLUMNS if rows[name].get(c) in (None, "", False)] == []
