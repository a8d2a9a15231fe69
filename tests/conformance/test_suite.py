"""The suite finds what it is there to find: each offender fails its check, each good example passes all."""

import ast
import re
from pathlib import Path

import pytest

from clplat.config import discovery
from clplat.config.settings import Config, FabricSettings, Part
from clplat.errors import UserError
from clplat.run.build import build
from clplat.testing import CHECKS, CheckResult, Subject, check, judge, run_checks
from clplat.testing.checks_of_processes import compare, drawn_by, go_on, in_processes

HERE = Path(__file__).parent
BAD, GOOD = HERE / "bad" / "offenders.py", HERE / "good" / "each_kind.py"
ACTING = HERE / "bad" / "acting_offenders.py"


def classes(file):
    """Public classes of a file, and the value of `fails` where they set it."""
    nodes = [n for n in ast.parse(file.read_text()).body if isinstance(n, ast.ClassDef) and n.name[0] != "_"]
    fails = {}
    for node in nodes:
        values = [s.value.value for s in node.body if isinstance(s, ast.Assign) and s.targets[0].id == "fails"]
        fails[node.name] = values[0] if values else None
    return fails


OFFENDERS, EXAMPLES = classes(BAD) | classes(ACTING), list(classes(GOOD))
QUICK = [c for c in CHECKS if c not in ("processes", "fewer_processes")]


def test_every_check_has_an_offender():
    assert set(OFFENDERS.values()) == {*CHECKS, ""}


@pytest.mark.parametrize("name", [n for n, fails in OFFENDERS.items() if fails in QUICK])
def test_an_offender_fails_its_check(name, monkeypatch):
    monkeypatch.setenv("CLPLAT_OFFENDER", "")
    file = ACTING if name in classes(ACTING) else BAD
    (result,) = run_checks(f"{file}:{name}", [OFFENDERS[name]])
    if name == "LeavesThread":
        discovery.load("strategies", f"{BAD}:{name}").gate.set()
    assert result.status == "failed"
    assert not result.message.startswith("raised") or name in ("Unsaveable", "GrowsFromData")


@pytest.mark.parametrize("name", EXAMPLES)
def test_a_good_example_fails_nothing(name):
    results = run_checks(f"{GOOD}:{name}", QUICK)
    assert [r for r in results if r.status == "failed"] == []
    assert {r.name for r in results if r.status == "not applicable"} <= {
        *("task_free", "erasure", "unlabelled", "acting", "accumulation")
    }


def test_what_acts_is_checked_for_it():
    for name in ("Actor", "Leaner", "Everything"):
        assert run_checks(f"{GOOD}:{name}", ["acting"])[0].status == "passed"


def test_wrong_hooks_stop_the_rest():
    hooks, *rest = run_checks(f"{BAD}:MisspeltHook", ["hooks", "state", "resume"])
    assert "finish" in hooks.message
    assert [r.status for r in rest] == ["not applicable", "not applicable"]


def test_a_check_that_raises_has_failed():
    def broken(subject):
        raise ValueError("two\nlines")

    result = judge(Subject("naive"), "state", broken)
    assert result.status == "failed"
    assert result.message.startswith("raised ValueError: two lines (")


def test_check_prints_a_line_each_and_the_exit_code(capsys, monkeypatch):
    from clplat import testing

    monkeypatch.setattr(testing, "CHECKS", {k: CHECKS[k] for k in ("hooks", "arguments", "seed")})
    assert check("naive") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines[:3]] == [["passed", n] for n in ("hooks", "arguments", "seed")]
    assert lines[3] == "naive: 3 passed"
    assert check(f"{BAD}:IgnoredArgument") == 1
    assert "IgnoredArgument(strength) is accepted and ignored" in capsys.readouterr().out


def test_unknown_names_are_the_users_mistake():
    with pytest.raises(UserError, match="unknown check 'resum' \\(valid: resume\\)"):
        run_checks("naive", ["resum"])
    with pytest.raises(UserError, match="unknown name 'nave'"):
        run_checks("nave")


def test_what_a_process_draws_is_found_by_changing_it():
    assert drawn_by(Subject(f"{GOOD}:Projected")) == {"reference": 6}
    assert drawn_by(Subject(f"{BAD}:FixedDraw")) == {}
    assert drawn_by(Subject("er")) == {}  # of an option that the suite sets anyway


def test_one_process_may_be_declared():
    (result,) = run_checks(f"{BAD}:Single", ["processes"])
    assert result == CheckResult("processes", "not applicable", "it declares one_process")
    config = Config(Part(f"{BAD}:Single"), Part("digits"), Part("mlp"), fabric=FabricSettings(devices=2))
    with pytest.raises(UserError) as raised:
        build(config)
    assert raised.value.faults == ("fabric.devices: 2 is out of range (valid: 1, since Single runs in one process)",)


def test_what_does_not_apply_is_not_counted_as_failed(capsys, monkeypatch):
    from clplat import testing

    monkeypatch.setattr(testing, "CHECKS", {k: CHECKS[k] for k in ("hooks", "unlabelled", "acting")})
    assert check("naive") == 0
    assert capsys.readouterr().out.splitlines()[-1] == "naive: 1 passed, 2 do not apply"
    monkeypatch.setattr(testing, "CHECKS", {k: CHECKS[k] for k in ("hooks", "unlabelled", "arguments")})
    assert check(f"{BAD}:SilentArgument") == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"{BAD}:SilentArgument: 1 passed, 1 does not apply, 1 failed: arguments"


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_two_processes(capfd):
    names = [
        *(f"{BAD}:{n}" for n in ("PlainMean", "OneProcess", "OwnGradient", "FixedDraw", "FirstWorld")),
        *(f"{GOOD}:{e}" for e in EXAMPLES if e not in ("Actor", "Leaner", "Imitator")),
    ]
    found = in_processes(names)
    assert capfd.readouterr() == ("", "")  # DDP's warnings and what the strategies print get between no lines
    results = {n.rpartition(":")[2]: judge(Subject(n), "processes", lambda s: compare(s, found[s.name])) for n in names}
    assert {results[n].status for n in ("PlainMean", "OwnGradient", "FixedDraw")} == {"failed"}
    assert "reduce losses by self.mean" in results["PlainMean"].message
    cause = r"offenders\.py, line \d+ is not averaged over processes: use clplat\.second_gradient"
    assert re.search(cause, results["OwnGradient"].message)
    assert "each process draws 6 remembered samples" in results["FixedDraw"].message
    assert results["OneProcess"].message == "fabric.devices: 2 is out of range (one process only)"
    assert {n: r for n, r in results.items() if n in (*EXAMPLES, "FirstWorld") and r.status != "passed"} == {}
    judged = ((n, judge(Subject(n), "fewer_processes", lambda s: go_on(s, found[s.name]))) for n in names)
    again = {name.rpartition(":")[2]: result for name, result in judged}
    assert "that goes on with what two began ends elsewhere" in again["FirstWorld"].message
    assert {n: r for n, r in again.items() if n in EXAMPLES and r.status != "passed"} == {}
