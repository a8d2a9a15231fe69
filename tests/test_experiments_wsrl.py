"""The full-scale configurations of experiments/wsrl: each loads, and takes two steps on data and two in its domain."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import clplat
from clplat.config.resolve import resolve
from clplat.data.environments import Gym, Maker
from clplat.errors import UserError
from clplat.run import checkpoint

pytest.importorskip("mujoco", reason="needs the extra rl")


def recorded(gym: Gym, folder: Path, steps: int = 60) -> str:
    """Noise in the layout of D4RL, of this domain's sizes and units."""
    generator = np.random.default_rng(0)
    seen = generator.normal(size=(steps + 1, *gym.shape))
    actions = gym.low + (gym.high - gym.low) * generator.random((steps, gym.actions))
    ends = np.arange(1, steps + 1) == steps
    np.savez(folder / "data.npz", observations=seen[:-1], next_observations=seen[1:], actions=actions,
             rewards=generator.random(steps), terminals=np.zeros(steps, dtype=bool), timeouts=ends)  # fmt: skip
    return str(folder / "data.npz")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of environments that are out of date, as published
@pytest.mark.parametrize("domain", ["locomotion", "antmaze", "adroit", "kitchen", "hopper"])
def test_a_published_setting_takes_two_steps_offline_and_two_online(domain: str, tmp_path: Path) -> None:
    name = f"wsrl/{domain}"
    options = resolve(config=name).stream.options
    try:
        gym = Maker(options["env"], options["env_options"])()
    except UserError as error:
        if "clplat[robotics]" not in str(error):  # an extra for environments of its own
            raise
        pytest.skip(str(error))
    steps = {"stream.env_steps": 4, "loop.max_steps": 2, "strategy.warmup_steps": 2, "strategy.batch": 2}
    small = {"loop.batch_size": 8, "loop.eval_every": None, "loop.eval_episodes": 1, "tracking.enabled": False}
    places = {"stream.data": recorded(gym, tmp_path), "stream.learn_from_data": True, "output": str(tmp_path)}
    result = clplat.run(name, quiet=True, **steps, **small, **places)
    state, _ = checkpoint.load_newest(result.run_dir / "checkpoints")
    assert state is not None
    returns = state["record"]["returns"][0]
    assert returns["offline_steps"] == 2
    assert returns["gradient_steps"] == 2 + 2 * 5  # four steps of the critics and one of the actor, twice
    assert state["strategy"]["memory.counts"].tolist() == [4, 4]
