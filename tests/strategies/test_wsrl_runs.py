"""WSRL through the loop: from an offline run into an environment, or in one run."""

import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

import clplat
from clplat import UserError
from clplat.run import checkpoint

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra rl")


@pytest.fixture
def config(tmp_path):
    """A configuration on a few steps of Pendulum under random torques."""
    env, rows = gymnasium.make("Pendulum-v1"), []
    seen, _ = env.reset(seed=0)
    rng = np.random.default_rng(0)
    for step in range(40):
        torque = rng.uniform(-2, 2, 1).astype(np.float32)
        following, reward, _, _, _ = env.step(torque)
        rows.append((seen, torque, reward, following, False, step % 20 == 19))
        seen = following if step % 20 != 19 else env.reset(seed=1)[0]
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    np.savez(tmp_path / "data.npz", **{k: np.stack(c) for k, c in zip(names, zip(*rows, strict=True), strict=True)})
    return {
        "stream": {
            "name": "rl",
            "data": str(tmp_path / "data.npz"),
            "env_steps": 0,
            "probe": 8,
            "returns": [-3000, 0],
        },
        "backbone": {"name": "actor_critic", "actor_hidden": [8], "critic_hidden": [8]},
        "strategy": {"name": "wsrl", "batch": 4, "warmup_steps": 12, "penalty_actions": 2, "max_backup": 2},
        "loop": {"max_steps": 3, "batch_size": 8, "eval_episodes": 1, "checkpoint_seconds": None},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
    }


def run(config, **changes):
    return clplat.run(config, quiet=True, **changes).run_dir


def state(run_dir):
    found, _ = checkpoint.load_newest(run_dir / "checkpoints")
    return found


def moments(found):
    return [t for m in found["resumed"]["optimizer"]["state"].values() for t in m.values() if torch.is_tensor(t)]


def model(found):
    return {k: t for k, t in found["strategy"].items() if k.startswith("model.")}


def test_a_start_run_brings_weights_and_optimizer_and_the_warm_up_leaves_both(config):
    offline = run(config)
    online = {"stream.learn_from_data": False, "stream.env_steps": 12, "start.run": str(offline)}
    before, after = state(offline), state(run(config, **online))
    assert moments(before)
    for a, b in zip(moments(before), moments(after), strict=True):
        assert torch.equal(a, b)
    for name, tensor in model(before).items():
        assert torch.equal(tensor, model(after)[name]), name
    assert after["strategy"]["memory.counts"][0] == 12
    moved = state(run(config, **{**online, "stream.env_steps": 14}))
    assert any(not torch.equal(t, model(moved)[name]) for name, t in model(before).items())
    steps = {float(m["step"]) for m in moved["resumed"]["optimizer"]["state"].values()}
    assert max(steps) == 3 + 2 * 4  # three offline, and after the warm-up two times U
    assert 3 + 2 in steps  # the actor's


def test_one_run_is_an_offline_run_and_one_from_it(config):
    whole = state(run(config, **{"stream.env_steps": 12}))
    parts = state(run(config))
    for name, tensor in model(parts).items():
        assert torch.equal(tensor, model(whole)[name]), name


def test_another_architecture_than_the_offline_phases_is_refused(config):
    offline = run(config)
    online = {"stream.learn_from_data": False, "stream.env_steps": 12, "start.run": str(offline)}
    with pytest.raises(UserError, match=r"start\.run: .*critics"):
        run(config, **online, **{"backbone.critics": 3})


def test_the_loop_asks_before_the_first_step_in_the_environment(config, monkeypatch):
    """A policy no better than random is told of while nothing has been stored yet."""
    from clplat.strategies.wsrl import WSRL

    at, inner = [], WSRL.handover

    def noted(self, *args):
        at.append((self.observed, self.learned_offline))
        return inner(self, *args)

    monkeypatch.setattr(WSRL, "handover", noted)
    with pytest.warns(UserWarning, match=r"hardly more than random actions \(-100\)"):
        run(config, **{"stream.env_steps": 3, "stream.returns": [-100.0, 0.0]})
    assert at == [(0, 3)]


@pytest.mark.parametrize("restart", [False, True])
def test_without_an_offline_phase_nothing_runs(config, restart):
    """Nor where a later environment would begin without one: that is known before the first."""
    data = config["stream"].pop("data")
    config["stream"] |= {"env_steps": 12, "sequence": [{"data": data}, {}] if restart else []}
    with pytest.raises(UserError, match="WSRL has nothing to start from in Pendulum-v1"):
        run(config, **{"strategy.restart": restart})
    assert not Path(config["output"]).exists()


@pytest.mark.parametrize(("better", "said"), [(-1e5, True), (0.0, False)])
def test_what_random_actions_reach_is_measured_where_the_stream_does_not_say_it(config, monkeypatch, better, said):
    """More than their mean: two standard errors."""
    monkeypatch.setattr("clplat.run.interaction.evaluate_return", lambda *_: better)
    config["stream"] |= {"returns": [], "env_steps": 3}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(config)
    lines = [str(w.message) for w in caught if "hardly more than random actions" in str(w.message)]
    assert len(lines) == said
    drawn = [float(line.split("(")[1].split(")")[0]) for line in lines]
    assert all(-1900 < value < 0 for value in drawn)


def test_a_dry_run_takes_two_steps_in_the_environment_and_makes_no_start_run(config, tmp_path):
    config["start"] = {"run": str(tmp_path / "first.yaml")}
    (tmp_path / "first.yaml").write_text(yaml.safe_dump({k: config[k] for k in ("stream", "backbone", "strategy")}))
    more = {"stream.learn_from_data": False, "stream.env_steps": 10**9, "dry_run": True}
    result = clplat.run(config, quiet=True, **more)
    assert result.summary["interaction"][0]["evaluations"][-1][0] == 2
    assert not Path(config["output"]).exists()
