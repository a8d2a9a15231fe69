"""The user's own code that fails: one line with hook, file and line, exit code 2; the traceback with --debug."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from clplat import CodeError, UserError
from clplat.cli import main

HEAD = '''import torch
import torch.nn.functional as F
from clplat import Data, Experience, Kind, Strategy, Stream

class Mine(Strategy):
    """Mine."""
    kinds = frozenset({Kind.LEARN, Kind.ADAPT})
    paper = "none: a test"
    def adapt_step(self, inputs):
        return self.model(inputs).detach()
    def training_step(self, batch, batch_idx):
        return self.mean(F.cross_entropy(self.model(batch[0]), batch[1], reduction="none"))
'''
STREAM = '''import numpy as np
from clplat import Data, Experience, Kind, Stream

class Own(Stream):
    """Own."""
    def __init__(self, *, seed=None, data_root=None):
        data = Data(np.zeros((4, 3)), np.zeros(4))
        super().__init__([Experience(0, "first", Kind.LEARN, data)], num_classes=2, input_shape=(3,))
'''
CASES = {
    "an import that fails": (
        "import no_such_package_of_mine\n" + HEAD,
        r"strategy: mine\.py, line 1: ModuleNotFoundError: No module named 'no_such_package_of_mine'",
    ),
    "a hook that raises": (
        HEAD.replace("        return self.mean", "        raise KeyError('gone')\n        return self.mean"),
        r"in Mine\.training_step, mine\.py, line 12: KeyError: 'gone'",
    ),
    "a constructor without a model": (
        HEAD + "    def __init__(self, lr: float = 0.1):\n        super().__init__(None)\n",
        r"strategy: Mine\.__init__\(\) got an unexpected keyword argument 'model'; it is called with `model`.*",
    ),
    "a loss that is a float": (
        HEAD.replace('reduction="none"))', 'reduction="none")).item()'),
        r"strategy: Mine\.training_step \(mine\.py, line 11\) gives a float \(valid: a tensor of one number.*or None\)",
    ),
    "a loss that is not reduced": (
        HEAD.replace("self.mean(", "("),
        r"strategy: Mine\.training_step \(mine\.py, line 11\) gives a loss of shape \(\d+,\) \(valid: .*\)",
    ),
    "a loss without a gradient": (
        HEAD.replace('reduction="none"))', 'reduction="none")).detach()'),
        r"strategy: Mine\.training_step \(mine\.py, line 11\) gives a loss without a gradient \(valid: .*\)",
    ),
}


def run(*more: str) -> int:
    return main(["run", "-q", "--tracking.enabled", "false", "--loop.max_steps", "1", *more])


@pytest.mark.parametrize("case", CASES)
def test_strategy(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text, expected = CASES[case]
    (tmp_path / "mine.py").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert run("--strategy", "mine.py") == 2
    lines = capsys.readouterr().err.replace(f"{tmp_path}/", "").splitlines()
    assert re.fullmatch(rf"clplat: {expected}( \(--debug shows the traceback\))?", lines[-1]), lines
    with pytest.raises(UserError):
        run("--strategy", "mine.py", "--debug")


def test_numpy_in_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "own.py").write_text(STREAM)
    monkeypatch.chdir(tmp_path)
    assert run("--strategy", "naive", "--stream", "own.py") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "in Own.__init__" in line
    assert "own.py, line 7: TypeError: Data: inputs are a ndarray (valid: a tensor, as torch.from_numpy makes" in line
    with pytest.raises(CodeError) as raised:
        run("--strategy", "naive", "--stream", "own.py", "--debug")
    assert isinstance(raised.value.__cause__, TypeError)


def test_a_stream_without_a_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(STREAM.replace("seed=None, ", ""))
    assert run("--strategy", "naive", "--stream", "own.py:Own") == 2
    line = "stream: Own.__init__() got an unexpected keyword argument 'seed'; it is called with `seed` and `data_root`"
    assert capsys.readouterr().err.startswith(f"clplat: {line}")


def test_predictions_of_a_wrong_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text(HEAD.replace(".detach()", ".argmax(1).tolist()"))
    monkeypatch.chdir(tmp_path)
    more = ["--stream.source", "false", "--stream.samples", "20", "--backbone", "cnn", "--head", "linear"]
    assert run("--strategy", "mine.py", "--stream", "corruptions", *more) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"Mine\.adapt_step \(.*mine\.py, line 9\) gives a list \(valid: a tensor of predictions, or", line)
