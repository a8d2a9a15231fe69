"""The console script's commands beside `run`."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from saying import said

import clplat
from clplat.cli import main
from clplat.commands import support
from clplat.config import resolve as config_module
from clplat.errors import UserError


def test_list(capsys: pytest.CaptureFixture[str]):
    _, out, _ = said(capsys, "list", "strategies")
    line = next(x for x in out.splitlines() if x.startswith("er "))
    assert line.split()[:3] == ["er", "learn", "arXiv:1902.10486"]
    everything = json.loads(said(capsys, "list", "--json")[1])
    assert set(everything) == {"strategies", "streams", "backbones", "heads", "merges", "metrics", "experiments"}
    er = next(e for e in everything["strategies"] if e["name"] == "er")
    assert er["kinds"] == ["learn"]
    assert {"name", "summary", "formula", "source"} <= set(everything["metrics"][0])


def test_what_strategies_were_seen_to_do(capsys: pytest.CaptureFixture[str]):
    """A row each, and the reasons by number; a strategy that nobody recorded says so."""
    table = said(capsys, "list", "strategies", "--support")[1].splitlines()
    row, columns = next(line.split() for line in table if line.startswith("er ")), table[0].split()
    assert dict(zip(["name", *columns], row, strict=True))["processes"] == "yes"
    number = dict(zip(["name", *columns], row, strict=True))["accumulation"]
    assert any(line.split()[:4] == [number, "it", "draws", "for"] for line in table)
    found = json.loads(said(capsys, "list", "strategies", "--support", "--json")[1])
    assert found["er"]["resume"] is True
    assert "?" not in "\n".join(table)
    assert support.shown(["er", "mine"]).splitlines()[2].split()[:2] == ["mine", "?"]
    fault = said(capsys, "list", "streams", "--support")
    assert fault[0] == 2
    assert "--support is of strategies, not of streams" in fault[2][0]


def test_list_in_python_gives_what_the_command_prints(capsys: pytest.CaptureFixture[str]):
    for group in ("strategies", None):
        found = clplat.list(group)
        assert said(capsys, "list", *([group] if group else []))[1] == f"{found!r}\n"
        assert found.frame()["name"].tolist() == [row["name"] for row in found]
        assert "<td>er_ace</td>" in found._repr_html_()
    everything = json.loads(said(capsys, "list", "--json")[1])
    assert json.loads(json.dumps(found)) == [{"section": s, **row} for s, rows in everything.items() for row in rows]
    with pytest.raises(UserError, match=r"unknown group 'strategys' \(did you mean strategies\?\)"):
        clplat.list("strategys")


def test_a_star_import_leaves_pythons_own_list():
    names: dict[str, object] = {}
    exec("from clplat import *\nmine = list", names)
    assert names["mine"] is list
    assert "list" in dir(clplat)


def test_cp(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    name, source = next(iter(config_module.experiments().items()))
    target = tmp_path / source.name
    assert said(capsys, "cp", name, str(tmp_path))[1].strip() == str(target)
    assert target.read_bytes() == source.read_bytes()
    target.write_text("changed")
    code, _, err = said(capsys, "cp", name, str(target))
    assert (code, err) == (2, [f"clplat: cp: {target} is there already (--force overwrites it)"])
    assert target.read_text() == "changed"
    assert said(capsys, "cp", name, str(target), "--force")[0] == 0
    assert target.read_bytes() == source.read_bytes()
    assert said(capsys, "cp", name, str(tmp_path / "no" / "where.yaml"))[0] == 2


def test_validate(capsys: pytest.CaptureFixture[str], tmp_path: Path):
    file = tmp_path / "c.yaml"
    file.write_text("strategy: naive\nseeds: [0, 1]\n")
    assert said(capsys, "validate", str(file))[:2] == (0, f"{file}: no faults (2 runs)\n")
    file.write_text("strategy: naiv\nloop: {max_epoch: 1, batch_size: 0}\nseeed: 1\n")
    code, _, err = said(capsys, "validate", str(file))
    assert (code, len(err)) == (2, 4)


@pytest.mark.parametrize(
    ("argv", "module", "function", "asked"),
    [
        (["check", "naive"], "testing", "check", (("naive", "strategies", []), {})),
        (
            ["sweep", "c.yaml", "--trials", "3", "--loop.max_epochs", "2"],
            "sweep.study",
            "sweep",
            (
                ("c.yaml", ["--loop.max_epochs", "2"]),
                {"trials": 3, "workers": 1, "join": False, "quiet": False, "launcher": "local", "resources": []},
            ),
        ),
        (
            ["ui", "--output", ".", "--port", "0"],
            "tracking.server",
            "serve",
            ((".",), {"uri": None, "host": "127.0.0.1", "port": 0, "experiment": None}),
        ),
    ],
)
def test_commands_that_only_hand_over(
    monkeypatch: pytest.MonkeyPatch, argv: list[str], module: str, function: str, asked: tuple[Any, ...]
):
    got: list[Any] = []
    fake = ModuleType(f"clplat.{module}")
    setattr(fake, function, lambda *args, **options: got.append((args, options)) or 0)
    monkeypatch.setitem(sys.modules, f"clplat.{module}", fake)
    assert main(argv) == 0
    assert got == [asked]


def test_report_of_an_experiment(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for folder in ("demo/er/1-0", "demo/naive/1-0", "other/1-0"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "summary.json").write_text("{}")
    asked: list[Any] = []
    module = ModuleType("clplat.report")
    module.report_command = lambda dirs, out: asked.append((dirs, out)) or (out / "report.html", "table")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clplat.report", module)
    code, out, _ = said(capsys, "report", "--experiment", "demo", "--output", str(tmp_path), "--dest", "there")
    assert (code, out) == (0, "table\nreport: there/report.html\n")
    assert [d.relative_to(tmp_path).as_posix() for d in asked[0][0]] == ["demo/er/1-0", "demo/naive/1-0"]
    code, _, err = said(capsys, "report", "--experiment", "dmo", "--output", str(tmp_path))
    assert code == 2
    assert "did you mean demo" in err[0]


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_knows_commands_and_names(capsys: pytest.CaptureFixture[str], shell: str):
    code, out, _ = said(capsys, "completion", shell)
    assert code == 0
    assert all(word in out for word in ("validate", "--loop.max_epochs", "naive", "--strategy.memory", "demo/digits"))


@pytest.mark.parametrize(
    ("argv", "fault"),
    [
        (["ui", "--output", "nowhere"], "ui: --output nowhere: there is no such folder"),
        (["ui", "--uri", "sqlite:///no.db"], "ui: --uri sqlite:///no.db: there is no such file"),
        (["run", "strategy.lr=0.1"], "(keys are written --strategy.lr=0.1)"),
        (["run", "demo/digits", "strategy.lr=0.1"], "(keys are written --strategy.lr=0.1)"),
        (["report", "nowhere"], "report: nowhere is no folder of a run or of runs"),
    ],
)
def test_what_is_not_there_is_questioned(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, argv: list[str], fault: str
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    code, _, (line,) = said(capsys, *argv)
    assert code == 2
    assert fault in line
    assert list(tmp_path.iterdir()) == []


def test_a_report_of_a_folder_is_of_all_runs_in_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    runs = [tmp_path / "study" / f"trial-000{i}" / f"seed-{k}" for i in range(2) for k in range(2)]
    for run in runs:
        run.mkdir(parents=True)
        (run / "summary.json").write_text("{}")
    asked: list[Any] = []
    monkeypatch.setattr("clplat.report.report_command", lambda dirs, dest: asked.append(dirs) or (dest, ""))
    assert said(capsys, "report", str(tmp_path / "study"))[0] == 0
    assert said(capsys, "report", str(runs[1]), str(tmp_path / "study" / "trial-0000"))[0] == 0
    assert asked == [runs, [runs[1], runs[0]]]
