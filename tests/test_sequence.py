"""Several environments, one after the other: what the run measures in all of them, and against learning each alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import clplat
from clplat.metrics.adaptation import ReturnCurve
from clplat.metrics.returns import area
from clplat.run import checkpoint
from clplat.strategies.sac import SAC

pytest.importorskip("gymnasium", reason="needs the extra rl")

CONFIG: dict[str, Any] = {
    "stream": {"name": "rl", "env": "sliding:Sliding-v0", "env_steps": 60, "returns": [-40, 0],
               "sequence": [{"name": "one"}, {"name": "two"}, {"name": "three"}]},
    "backbone": {"name": "actor_critic", "actor_hidden": [8], "critic_hidden": [8]},
    "strategy": {"name": "sac", "batch": 8, "lr": 0.01, "gamma": 0.5},
    "loop": {"eval_every": 20, "eval_episodes": 2, "checkpoint_seconds": None, "representation": False},
    "tracking": {"enabled": False},
}  # fmt: skip


def run(folder: Path, **more: Any) -> Any:
    return clplat.run(CONFIG, quiet=True, output=str(folder), **more)


def last(run_dir: Path) -> dict[str, Any]:
    state, _ = checkpoint.load_newest(run_dir / "checkpoints")
    assert state is not None
    return state


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run(tmp_path_factory.mktemp("alone"), **{"strategy.restart": True})


def test_metrics_over_environments_are_those_of_the_returns(alone: Any, tmp_path: Path) -> None:
    result = run(tmp_path, reference=str(alone.run_dir))
    returns, reference = result.summary["interaction"], alone.summary["interaction"]
    scores = [[1 + entry["after"][name] / 40 for name in ("one", "two", "three")] for entry in returns]
    expected = {
        "final_return": sum(scores[2]) / 3,
        "return_forgetting": sum(scores[j][j] - scores[2][j] for j in range(3)) / 3,
    }
    areas = [[area(ReturnCurve(-40, 0, e["before"], *zip(*e["evaluations"], strict=True))) for e in entries]
             for entries in (returns, reference)]  # fmt: skip
    expected["return_forward_transfer"] = sum((a - b) / (1 - b) for a, b in zip(*areas, strict=True)) / 3
    assert {k: result.metrics[k] for k in expected} == pytest.approx(expected)
    lines = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    logged = [m["metrics"] for m in lines if m["axis"] == "experience"]
    assert [m["return/two"] for m in logged] == [e["after"]["two"] for e in returns]


def test_of_the_first_environment_a_reference_run_is_the_run_itself(alone: Any, tmp_path: Path) -> None:
    plain = run(tmp_path)
    entries = plain.summary["interaction"]
    assert entries[1]["before"] == entries[0]["after"]["two"]  # what is learned goes on
    assert alone.summary["interaction"][1]["before"] != alone.summary["interaction"][0]["after"]["two"]
    assert plain.summary["interaction"][0]["evaluations"] == alone.summary["interaction"][0]["evaluations"]
    assert plain.summary["why_null"]["return_forward_transfer"] == "no reference run is set (key `reference`)"


@pytest.mark.parametrize("options", [{"ewc_penalty": 10.0}, {"restart": True}, {"keep_memory": True}])
def test_cut_off_in_the_second_environment_it_goes_on_bit_for_bit(
    options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {f"strategy.{k}": v for k, v in options.items()} | {"loop.checkpoint_every": 20}
    whole = run(tmp_path / "whole", **more)
    observe, seen = SAC.observe, [0]

    def breaking(self: SAC, transition: Any) -> int:
        seen[0] += 1
        if seen[0] == 95:
            raise ZeroDivisionError
        return observe(self, transition)

    monkeypatch.setattr(SAC, "observe", breaking)
    with pytest.raises(clplat.CodeError, match="ZeroDivisionError"):
        run(tmp_path / "cut", **more)
    (cut,) = (tmp_path / "cut").glob("*/*")
    assert last(cut)["progress"]["experience"] == 1
    resumed = clplat.resume(cut, quiet=True)
    ours, theirs = last(resumed.run_dir), last(whole.run_dir)
    assert ours["strategy"].keys() == theirs["strategy"].keys()
    for name, tensor in theirs["strategy"].items():
        assert not torch.is_tensor(tensor) or torch.equal(tensor, ours["strategy"][name]), name
    assert resumed.summary["interaction"] == whole.summary["interaction"]
