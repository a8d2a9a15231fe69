"""A wrong key hides no wrong value: what parts refuse is told with it, and nothing that follows from the key alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

import clplat
from clplat.cli import main
from clplat.errors import UserError

BAD: dict[str, Any] = {
    "strategy": {"name": "er", "memry": 50, "replay_batch": -3},
    "stream": {"name": "digits", "validation": 7.0},
    "loop": {"batch_size": 0},
}
FAULTS = ["loop.batch_size", "strategy.memry", "strategy.replay_batch", "stream.validation"]


def told(capsys: pytest.CaptureFixture[str], tmp_path: Path, config: dict[str, Any], *words: str) -> list[str]:
    """The keys that a command has a line for."""
    path = tmp_path / "faulty.yaml"
    path.write_text(yaml.safe_dump(config))
    command, *flags = words
    assert main([command, str(path), "--output", str(tmp_path / "runs"), *flags]) == 2
    assert not (tmp_path / "runs").exists()
    return sorted(line.split(": ")[1] for line in capsys.readouterr().err.splitlines())


@pytest.mark.parametrize("words", [("validate",), ("run",), ("run", "--seeds", "0,1")])
def test_a_wrong_key_hides_no_wrong_value(words, tmp_path, capsys):
    assert told(capsys, tmp_path, BAD, *words) == FAULTS


@pytest.mark.parametrize("seeds", [None, [0, 1]])
def test_nor_does_it_in_python(seeds):
    with pytest.raises(UserError) as caught:
        clplat.run(BAD, seeds=seeds, quiet=True)
    assert sorted(fault.partition(":")[0] for fault in caught.value.faults) == FAULTS


def test_nor_in_another_run_of_the_file(tmp_path, capsys):
    runs = {"one": {"strategy.memry": 1}, "other": {"strategy.replay_batch": -3}}
    assert told(capsys, tmp_path, {"strategy": "er", "runs": runs}, "validate") == FAULTS[1:3]


def test_nor_in_a_sweep_or_beside_its_section(tmp_path, capsys):
    config = {**BAD, "stream": {"name": "digits", "validation": 0.1}, "loop": {}}
    space = {"strategy.lr": {"low": -1.0, "high": 0.1}}
    searched = ["strategy.memry", "strategy.replay_batch", "sweep.space.strategy.lr"]
    assert told(capsys, tmp_path, {**config, "sweep": {"space": space}}, "validate") == searched
    assert told(capsys, tmp_path, {**config, "sweep": {"space": space, "trials": 0}}, "validate") == [
        *searched, "sweep.trials"
    ]  # fmt: skip


def test_a_part_that_is_not_known_hides_no_wrong_value_of_the_stream(tmp_path, capsys):
    config = {"strategy": "eer", "stream": BAD["stream"]}
    assert told(capsys, tmp_path, config, "validate") == ["strategy", "stream.validation"]


@pytest.mark.parametrize(
    ("config", "alone"),
    [
        ({"strategy": "er", "stream": {"validaton": 0.1}, "loop": {"evaluate_on": "valid"}}, "stream.validaton"),
        ({"strategy": {"name": "er", "memory": "many"}, "stream": "images"}, "strategy.memory"),  # its data are missing
        ({"strategy": "naive", "stream": {"name": "arrays", "pth": "a.npz"}}, "stream.pth"),  # which can't be made so
    ],
)
def test_what_may_follow_from_the_key_is_not_told(config, alone, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("CLPLAT_DATA", raising=False)
    assert told(capsys, tmp_path, config, "validate") == [alone]
