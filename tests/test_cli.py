"""The console script: commands, exit codes, and no traceback for a user's mistake."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import clplat
from clplat.cli import COMMANDS, main
from clplat.commands.arguments import parse_seeds
from clplat.config import resolve as config_module
from clplat.errors import DivergedError, Interrupted, MissingError, UserError


class Calls:
    """Stands in for clplat.api: notes what it was asked, and does what the test says."""

    def __init__(self, folder: Path) -> None:
        self.configs: list[Any] = []
        self.resumed: list[Path] = []
        self.errors: dict[int, BaseException] = {}
        self.options: dict[str, Any] = {}
        self.folder = folder

    def run_config(self, config: Any, **options: Any) -> SimpleNamespace:
        self.configs.append(config)
        self.options = options
        if len(self.configs) in self.errors:
            raise self.errors[len(self.configs)]
        return self._result()

    def resume(self, run_dir: Path, **options: Any) -> SimpleNamespace:
        self.resumed.append(run_dir)
        return self._result()

    def _result(self) -> SimpleNamespace:
        metrics = {"average_accuracy": 0.5, "h_mean": None}
        return SimpleNamespace(run_dir=self.folder, summary={"a": 1}, metrics=metrics, status="complete", note=None)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Calls:
    calls = Calls(tmp_path)
    module = ModuleType("clplat.api")
    module.run_config, module.resume = calls.run_config, calls.resume  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "clplat.api", module)
    return calls


def said(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, list[str]]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    assert "Traceback" not in err
    return code, out, err.splitlines()


# --- help ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_names_every_command(capsys: pytest.CaptureFixture[str], argv: list[str]):
    code, out, err = said(capsys, *argv)
    assert (code, err) == (0, [])
    assert all(f"  {command} " in out for command in COMMANDS)


def test_version(capsys: pytest.CaptureFixture[str]):
    assert said(capsys, "--version")[1].startswith("clplat 0")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(capsys: pytest.CaptureFixture[str], command: str):
    code, out, err = said(capsys, command, "--help")
    assert (code, err) == (0, [])
    assert f"usage: clplat {command}" in out


def test_help_shows_the_text_of_each_hyper_parameter(capsys: pytest.CaptureFixture[str]):
    _, general, _ = said(capsys, "run", "--help")
    assert "--loop.max_epochs INT" in general
    assert "passes over each experience's training data" in general
    assert "--strategy.memory" not in general
    _, out, _ = said(capsys, "run", "--strategy", "er", "--help", "--stream=digits")
    assert "--strategy.memory INT" in out
    assert "samples kept in all, by reservoir sampling" in out
    assert "(default: 500)" in out
    assert "--strategy.schedule {constant,cosine}" in out  # of the base class
    assert "--stream.experiences" in out
    code, _, err = said(capsys, "run", "--strategy", "qr", "--help")
    assert code == 2
    assert err[0].startswith("clplat: strategy: unknown name 'qr'")


# --- the user's mistakes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "lines"),
    [
        (["runn"], ["unknown command 'runn' (did you mean run?)"]),
        (["qqqqq"], [f"unknown command 'qqqqq' (commands: {', '.join(COMMANDS)})"]),
        (["run"], ["run: name a configuration, or at least --strategy (see `clplat run --help`)"]),
        (["run", "a.yaml", "b.yaml"], ["run: unrecognized arguments: b.yaml"]),
        (["run", "away.yaml"], ["config: 'away.yaml' is neither a file nor an experiment"]),
        (
            ["run", "--strategy", "er", "--strategy.rnk", "1", "--strategy.lr", "abc"],
            [
                "strategy.rnk: no such key (strategy takes: memory, replay_batch, optimizer, lr, momentum, "
                "weight_decay, schedule, warmup)",
                "strategy.lr: 'abc' is not a float",
            ],
        ),
        (["run", "c", "--seeds", "4..0"], ["seeds: '4..0' is neither a number nor a range (valid: 0..4, or 0,1,2)"]),
        (["run", "--strategy", "er", "--seeds", "1", "--seed", "2"], ["seeds: give --seed or --seeds, not both"]),
        (["run", "--resume", "nowhere"], ["resume: nowhere is not a run's folder (it holds no config.yaml)"]),
        (
            ["run", "--resume", ".", "--seed", "3"],
            ["resume: goes on with the run's own configuration and takes nothing else (got --seed)"],
        ),
        (["list", "strategys"], ["list: unknown group 'strategys' (did you mean strategies?)"]),
        (["list", "--jsn"], ["list: no such option --jsn (did you mean --json?)"]),
        (["check", "digit"], ["check: unknown name 'digit' (did you mean digits?)"]),
        (["check", "avalanche"], ["check: 'avalanche' is a strategy and a stream (say --as strategy, or --as stream)"]),
        (["check", "away.py"], None),
        (["check", "er", "--stream.seed", "1"], None),
        (["check", "digits", "--loop.max_epochs", "1"], None),
        (["new", "strategy", "er"], None),
        (["new", "stream", "torch"], None),
        (["new", "method", "mine"], None),
        (["check"], ["check: the following arguments are required: PATH_OR_NAME"]),
        (["validate", "away"], ["config: 'away' is neither a file nor an experiment"]),
        (["report"], ["report: name folders of runs, or --experiment NAME"]),
        (
            ["report", "a", "b"],
            [f"report: {d} is no folder of a run or of runs (there is no summary.json in it)" for d in "ab"],
        ),
        (["ui", "--port", "x"], ["ui: argument --port: invalid int value: 'x'"]),
        (["completion", "fish"], None),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    argv: list[str],
    lines: list[str] | None,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(config_module, "_EXPERIMENTS", ())
    code, out, err = said(capsys, *argv)
    assert (code, out) == (2, "")
    assert err
    assert all(line.startswith("clplat: ") for line in err)
    if lines is not None:
        assert err == [f"clplat: {line}" for line in lines]


def test_debug_shows_where():
    with pytest.raises(UserError):
        main(["runn", "--debug"])


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (UserError("a", "b"), 2),
        (MissingError("data: put them there"), 3),
        (Interrupted("resume with X"), 130),
        (DivergedError("the loss is not finite"), 1),
        (KeyboardInterrupt(), 130),
        (OSError(28, "No space left on device"), 1),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], api: Calls, error: BaseException, code: int):
    api.errors[1] = error
    got, _, err = said(capsys, "run", "--strategy", "naive")
    assert got == code
    assert err
    assert all(line.startswith("clplat: ") for line in err)


def test_ctrl_c_before_a_run_starts():
    code = "import os, clplat.cli as c; c._dispatch = lambda a: os.kill(os.getpid(), 2); print(c.main([]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "130"
    assert done.stderr.strip() == "clplat: interrupted"


def test_a_closed_pipe_is_no_error():
    done = subprocess.run(
        f"{sys.executable} -m clplat list | head -1", shell=True, capture_output=True, text=True, check=True
    )
    assert done.stdout == "strategies:\n"
    assert done.stderr == ""


# --- run ----------------------------------------------------------------------------------------------------------


def test_run_hands_over_a_resolved_configuration(capsys: pytest.CaptureFixture[str], api: Calls, tmp_path: Path):
    file = tmp_path / "mine.yaml"
    file.write_text("strategy: {name: er, memory: 4}\n")
    code, out, _ = said(capsys, "run", "--seed", "3", str(file), "--quiet", "--strategy.lr=0.2")
    assert code == 0
    (config,) = api.configs
    assert (config.seed, config.strategy.options["memory"], config.strategy.options["lr"]) == (3, 4, 0.2)
    assert api.options == {"dry_run": False, "quiet": True}
    assert "average_accuracy" in out
    assert "h_mean" not in out
    assert f"complete: {tmp_path}" in out


def test_dry_run(capsys: pytest.CaptureFixture[str], api: Calls):
    assert said(capsys, "run", "--strategy", "naive", "--dry-run")[1].startswith("dry run: ")
    assert api.options["dry_run"] is True


def test_resume(capsys: pytest.CaptureFixture[str], api: Calls, tmp_path: Path):
    (tmp_path / "config.yaml").write_text("strategy: naive\n")
    assert said(capsys, "run", "--resume", str(tmp_path))[0] == 0
    assert api.resumed == [tmp_path]
    assert api.configs == []


def test_seeds_run_one_after_another_and_are_compared(
    capsys: pytest.CaptureFixture[str], api: Calls, monkeypatch: pytest.MonkeyPatch
):
    compared: list[Any] = []
    monkeypatch.setattr(
        "clplat.commands.run._compare", lambda dirs, configs: compared.append((len(dirs), len(configs)))
    )
    code, _, err = said(capsys, "run", "--strategy", "naive", "--seeds", "0..2")
    assert (code, compared) == (0, [(3, 3)])
    assert [c.seed for c in api.configs] == [0, 1, 2]
    assert err[0] == "[1/3] naive-digits-mlp, seed 0"


def test_a_diverged_seed_stops_no_other_and_fails_the_command(
    capsys: pytest.CaptureFixture[str], api: Calls, monkeypatch: pytest.MonkeyPatch
):
    compared: list[Any] = []
    monkeypatch.setattr("clplat.commands.run._compare", lambda dirs, configs: compared.append(len(dirs)))
    api.errors[2] = DivergedError("the loss is not finite")
    code, _, err = said(capsys, "run", "--strategy", "naive", "--seeds", "0", "1", "2")
    assert (code, compared, len(api.configs)) == (1, [2], 3)
    assert "clplat: naive-digits-mlp, seed 1: the loss is not finite" in err
    api.configs.clear()
    api.errors[2] = Interrupted("stopped")
    assert said(capsys, "run", "--strategy", "naive", "--seeds", "0,1,2")[0] == 130
    assert len(api.configs) == 2


@pytest.mark.parametrize(
    ("words", "seeds"),
    [(["0..4"], [0, 1, 2, 3, 4]), (["0,1,2"], [0, 1, 2]), (["[3, 5]"], [3, 5]), (["1", "4..5"], [1, 4, 5])],
)  # fmt: skip
def test_seeds(words: list[str], seeds: list[int]):
    assert parse_seeds(words) == seeds


@pytest.mark.parametrize("words", [["x"], ["-1"], ["1..x"], [""], ["0,0"], ["0..2,1"]])
def test_seeds_that_are_none(words: list[str]):
    with pytest.raises(UserError, match=r"^seeds: "):
        parse_seeds(words)


# --- the other commands -------------------------------------------------------------------------------------------


def test_list(capsys: pytest.CaptureFixture[str]):
    _, out, _ = said(capsys, "list", "strategies")
    line = next(x for x in out.splitlines() if x.startswith("er "))
    assert line.split()[:3] == ["er", "learn", "arXiv:1902.10486"]
    everything = json.loads(said(capsys, "list", "--json")[1])
    assert set(everything) == {"strategies", "streams", "backbones", "heads", "metrics", "experiments"}
    er = next(e for e in everything["strategies"] if e["name"] == "er")
    assert er["kinds"] == ["learn"]
    assert {"name", "summary", "formula", "source"} <= set(everything["metrics"][0])


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
                {"trials": 3, "workers": 1, "join": False, "quiet": False},
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
