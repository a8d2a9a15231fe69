"""Acting, stopped anywhere: no step in the environment is lost or taken twice, and what follows is the same bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import clplat
from clplat.errors import Interrupted
from clplat.run import checkpoint
from clplat.run.loop import Runner

pytest.importorskip("gymnasium", reason="needs the extra rl")


def config(folder: Path, **stream: Any) -> dict[str, Any]:
    """A small agent; random actions first, then two kinds of step after each step in the environment."""
    return {
        "name": "acting",
        "stream": {"name": "rl", "env": "Pendulum-v1", "env_steps": 230, **stream},
        "backbone": {"name": "actor_critic", "actor_hidden": [8], "critic_hidden": [8]},
        "strategy": {"name": "sac", "batch": 16, "random_steps": 30, "memory": 300},
        "loop": {"eval_every": 60, "eval_episodes": 1, "checkpoint_every": 7, "checkpoint_seconds": None},
        "tracking": {"enabled": False},
        "output": str(folder),
    }


def outcome(run_dir: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Measurements and every tensor of the learner, its memory among them."""
    state, _ = checkpoint.load_newest(run_dir / "checkpoints")
    assert state is not None
    tensors: dict[str, torch.Tensor] = {}
    checkpoint.flatten({"strategy": state["strategy"], "resumed": state["resumed"]}, tensors)
    return state["record"]["returns"][0], tensors


def assert_same(a: Any, b: Any) -> None:
    assert a[0] == b[0]
    assert a[1].keys() == b[1].keys()
    assert all(torch.equal(v, b[1][k]) for k, v in a[1].items())


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return outcome(clplat.run(config(tmp_path_factory.mktemp("straight")), quiet=True).run_dir)


@pytest.mark.parametrize("stop_at", [11, 90, 211])
def test_stopped_within_an_episode_it_goes_on_bit_for_bit(
    stop_at: int, straight: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the steps before the first update, after it, and in the second episode."""
    run_until(stop_at, config(tmp_path), monkeypatch)
    (run_dir,) = (tmp_path / "acting").iterdir()
    state, _ = checkpoint.load_newest(run_dir / "checkpoints")
    assert state is not None
    assert state["progress"]["env_step"] == stop_at  # not at the end of the episode, 200 steps long
    assert len(state["strategy"]["memory.stored.rows"]) >= stop_at
    torch.manual_seed(12345)
    clplat.resume(run_dir, quiet=True)
    assert_same(outcome(run_dir), straight)


def run_until(env_step: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run, and ask for a stop once so many steps have been taken in the environment."""
    between = Runner._between_steps

    def asking(self: Runner, experience: Any) -> None:
        self.stop_requested = self.progress.env_step >= env_step
        between(self, experience)

    with monkeypatch.context() as patched:
        patched.setattr(Runner, "_between_steps", asking)
        with pytest.raises(Interrupted):
            clplat.run(options, quiet=True)


def test_counters_are_apart(straight: Any) -> None:
    """Two gradient steps (critics, actor) for each step in the environment but the first ones."""
    returns = straight[0]
    assert [step for step, _ in returns["evaluations"]] == [60, 120, 180, 230]
    assert returns["offline_steps"] == 0
    assert returns["gradient_steps"] == 2 * (230 - 30)


@pytest.mark.slow
def test_several_environments_step_side_by_side_and_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many transitions as steps, whatever the number of seats divides; stopped, it goes on bit for bit."""
    whole = outcome(clplat.run(config(tmp_path / "a", envs=3, env_steps=100), quiet=True).run_dir)
    run_until(60, config(tmp_path / "b", envs=3, env_steps=100), monkeypatch)
    (run_dir,) = (tmp_path / "b" / "acting").iterdir()
    clplat.resume(run_dir, quiet=True)
    assert_same(outcome(run_dir), whole)
    assert whole[0]["evaluations"][-1][0] == 100


def test_what_goes_wrong_beside_is_said_here(tmp_path: Path) -> None:
    from clplat.data.environments import Maker
    from clplat.run.seats import RemoteSeat

    seat = RemoteSeat(Maker("Pendulum-v1"))
    try:
        seat.reset(0)
        seat.send("no action")
        with pytest.raises(RuntimeError, match="in the process of an environment"):
            seat.receive()
    finally:
        seat.close()
