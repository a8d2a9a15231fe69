"""`clplat new`: what it writes passes every check and runs as it is; it overwrites nothing and refuses bad names."""

from __future__ import annotations

from pathlib import Path

import pytest

import clplat
from clplat.cli import main
from clplat.testing import CHECKS, STREAM_CHECKS, run_checks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with one file of each kind."""
    monkeypatch.chdir(tmp_path)
    assert main(["new", "strategy", "my_method"]) == 0
    assert main(["new", "stream", "my_data"]) == 0
    return tmp_path


def test_what_is_written_says_how_to_go_on(capsys: pytest.CaptureFixture[str], folder: Path) -> None:
    assert sorted(p.name for p in folder.iterdir()) == ["my_data.py", "my_method.py"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "my_method.py"
    assert lines[-2:] == [
        "check it:  clplat check my_data.py",
        "run it:    clplat run --strategy er --stream my_data.py",
    ]
    assert "class MyMethod(Strategy):" in (folder / "my_method.py").read_text()


def test_the_strategy_passes_every_check(folder: Path) -> None:
    results = run_checks("my_method.py", [c for c in CHECKS if c != "processes"])
    assert {r.name for r in results if r.status != "passed"} == {"erasure", "unlabelled", "acting"}
    assert not [r for r in results if r.status == "failed"]


@pytest.mark.slow
def test_the_strategy_ends_alike_on_two_processes(folder: Path) -> None:
    assert [r.status for r in run_checks("my_method.py", ["processes"])] == ["passed"]


def test_the_stream_passes_every_check(folder: Path) -> None:
    assert [r.status for r in run_checks("my_data.py", group="streams")] == ["passed"] * len(STREAM_CHECKS)


def test_both_run_together_and_their_options_are_refused_by_name(folder: Path) -> None:
    run = {"strategy": "my_method.py", "quiet": True, "tracking": {"enabled": False}, "loop": {"max_epochs": 2}}
    result = clplat.run(stream="my_data.py", **run)
    assert result.status == "complete"
    assert len(result.accuracy_matrix) == 6  # five experiences, and before them
    with pytest.raises(clplat.UserError, match=r"stream\.spread: -1\.0 is out of range \(valid: > 0\)"):
        clplat.run(stream={"name": "my_data.py", "spread": -1.0}, **run)


def test_nothing_is_overwritten_and_bad_names_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (folder / "my_method.py").read_text()
    for name, cause in {
        "my_method": "my_method.py is there already, and is not overwritten",
        "My-Method": "is no name for a file of Python",
        "_hidden": "is no name for a file of Python",
        "class": "is no name for a file of Python",
        "a/b": "is no name for a file of Python",
        "torch": "would hide Python's module 'torch'",
        "digits": "'digits' is a stream already",
    }.items():
        assert main(["new", "stream", name]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("clplat: new: ")
        assert cause in line
    assert (folder / "my_method.py").read_text() == before
    assert sorted(p.name for p in folder.iterdir()) == ["my_data.py", "my_method.py"]


def test_check_tells_strategy_and_stream_apart(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "my_data.py:MyData", "--stream.per_class", "5"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "my_data.py:MyData: 8 passed"
    both = folder / "both.py"
    both.write_text((folder / "my_data.py").read_text() + (folder / "my_method.py").read_text())
    assert main(["check", "both.py"]) == 2
    assert "'both.py' is a strategy and a stream" in capsys.readouterr().err
    assert main(["check", "both.py:MyData"]) == 0
    (folder / "neither.py").write_text("x = 1\n")
    assert main(["check", "neither.py"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
