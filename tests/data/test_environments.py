"""Environments: saved within an episode they go on bit for bit; physics is what was asked for."""

from __future__ import annotations

import json

import numpy as np
import pytest

from clplat.components.state import flatten, unflatten
from clplat.data.environments import Maker
from clplat.errors import UserError

pytest.importorskip("mujoco", reason="needs the extra rl")


@pytest.mark.parametrize("name", ["Pendulum-v1", "MountainCarContinuous-v0", "Hopper-v5", "Ant-v5", "Reacher-v5"])
def test_restored_environment_goes_on_bit_for_bit(name: str) -> None:
    """Through a checkpoint's format, into another one, across the end of the episode."""
    generator = np.random.default_rng(0)
    first, second = Maker(name)(), Maker(name)()
    assert first.savable
    first.reset(seed=3), second.reset(seed=9)
    for _ in range(7):
        first.step(generator.uniform(-1, 1, first.actions))
    tensors: dict[str, object] = {}
    plain = json.loads(json.dumps(flatten(first.state(), tensors)))  # type: ignore[arg-type]
    second.restore(unflatten(plain, tensors))  # type: ignore[arg-type]
    for _ in range(40):
        action = generator.uniform(-1, 1, first.actions)
        a, b = first.step(action), second.step(action)
        assert np.array_equal(a[0], b[0])
        assert a[1:4] == b[1:4]
        if a[2] or a[3]:
            assert np.array_equal(first.reset()[0], second.reset()[0])


def test_time_limit_is_part_of_what_is_saved() -> None:
    first, second = Maker("Pendulum-v1")(), Maker("Pendulum-v1")()
    first.reset(seed=0), second.reset(seed=0)
    for _ in range(150):
        first.step([0.0])
    second.restore(first.state())
    assert [second.step([0.0])[3] for _ in range(50)] == [False] * 49 + [True]


def test_actions_are_scaled_to_the_bounds_and_cut() -> None:
    maker = Maker("Pendulum-v1")
    rewards = []
    for action in (1.0, 5.0):
        env = maker()
        env.reset(seed=0)
        env.step([action])
        rewards.append(env.env.unwrapped.last_u)
    assert rewards == [2.0, 2.0]


def test_physics_are_factors_on_the_model() -> None:
    plain, heavy = Maker("Hopper-v5")().env.unwrapped.model, None
    heavy = Maker("Hopper-v5", physics={"mass": 1.5, "gravity": 2.0})().env.unwrapped.model
    assert np.array_equal(heavy.body_mass, plain.body_mass * 1.5)
    assert heavy.opt.gravity[2] == 2 * plain.opt.gravity[2]
    assert np.array_equal(heavy.geom_friction, plain.geom_friction)


def test_an_environment_that_can_not_be_made_is_one_line_whatever_it_raises(monkeypatch):
    def broken(**options):
        raise AssertionError  # without a word

    import gymnasium

    gymnasium.register("Broken-v0", entry_point=broken)
    try:
        with pytest.raises(UserError, match=r"stream\.env: 'Broken-v0' can't be made \(AssertionError"):
            Maker("Broken-v0", {"size": 3})()
    finally:
        del gymnasium.registry["Broken-v0"]
    for there, hint in ((False, True), (True, False)):
        monkeypatch.setattr("clplat.data.environments._register_robotics", lambda _, there=there: there)
        with pytest.raises(UserError, match="'Nowhere-v0' can't be made") as raised:
            Maker("Nowhere-v0")()
        assert ("need pip install 'clplat[robotics]'" in str(raised.value)) is hint
