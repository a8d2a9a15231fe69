"""The console script: commands, exit codes, and no traceback for a user's mistake."""

import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from saying import said

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
