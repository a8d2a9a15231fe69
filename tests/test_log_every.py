"""How often losses are logged is the user's to say, and changes no result."""

import json

import pytest
from mixed import mixed_config

import clplat
from clplat.config.resolve import resolve
from clplat.errors import UserError


def run(folder, every):
    config = mixed_config(folder)
    config["loop"] |= {"stop_after": 1, "log_every": every, "max_steps": 7, "max_epochs": 3, "accumulate": 1}
    result = clplat.run(config, quiet=True)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    return result, {line["step"]: line["metrics"]["train/loss"] for line in lines if "train/loss" in line["metrics"]}


def test_the_mean_loss_of_so_many_batches_is_logged(tmp_path):
    fine, each = run(tmp_path / "a", 1)
    coarse, thirds = run(tmp_path / "b", 3)
    assert list(each) == [1, 2, 3, 4, 5, 6, 7]
    assert list(thirds) == [3, 6, 7]
    assert thirds[3] == pytest.approx(sum(each[i] for i in (1, 2, 3)) / 3)
    assert thirds[7] == pytest.approx(each[7])
    assert fine.accuracy_matrix == coarse.accuracy_matrix
    assert fine.summary["representation"] == coarse.summary["representation"]


def test_zero_is_refused():
    with pytest.raises(UserError, match=r"loop\.log_every: 0 is out of range \(valid: ≥ 1\)"):
        resolve(["--strategy", "naive", "--loop.log_every", "0"])
