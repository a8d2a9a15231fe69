"""WSRL killed while it warms up, learns online or is evaluated: no transition is lost or counted twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from killing import killed, whole
from test_interaction import assert_same, config, outcome
from thorough import halved

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra rl")
WARMUP, STEPS, EVERY = 40, 100, 30


def recorded(folder: Path) -> str:
    """Forty steps of Pendulum under random torques."""
    env, generator, rows = gymnasium.make("Pendulum-v1"), np.random.default_rng(0), []
    before, _ = env.reset(seed=0)
    for at in range(40):
        torque = generator.uniform(-2, 2, 1).astype(np.float32)
        after, reward, *_ = env.step(torque)
        rows.append((before, torque, reward, after, False, at % 20 == 19))
        before = env.reset(seed=1)[0] if at % 20 == 19 else after
    names = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")
    np.savez(folder / "data.npz", **{k: np.stack(c) for k, c in zip(names, zip(*rows, strict=True), strict=True)})
    return str(folder / "data.npz")


def written(folder: Path) -> str:
    """Two steps on the data, then the environment, saved often; three steps after each of the environment."""
    told = config(folder, env_steps=STEPS, data=recorded(folder), probe=8)
    told["strategy"] = {"name": "wsrl", "batch": 4, "warmup_steps": WARMUP, "updates": 2, "penalty_actions": 2,
                        "max_backup": 2}  # fmt: skip
    told["loop"] |= {"max_steps": 2, "batch_size": 16, "eval_every": EVERY}
    path = folder / "acting.yaml"
    path.write_text(yaml.safe_dump(told))
    return str(path)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("straight")
    return outcome(whole(written(folder), folder))


def test_the_places_where_it_is_killed_are_what_they_are_called(straight: Any) -> None:
    """Each counts once: 100 transitions, 2 steps on the data, none in the warm-up, three for each step after it."""
    returns, tensors = straight
    assert tensors["/strategy/memory.counts"].tolist() == [STEPS, STEPS]
    assert returns["gradient_steps"] == 2 + 3 * (STEPS - WARMUP)
    assert [e[0] for e in returns["evaluations"]] == [30, 60, 90, 100]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "count"),
    halved(
        [
            ("explore", 25),  # in the warm-up
            ("explore", WARMUP + 1),  # at its last step's end, before the first update
            ("explore", 75),  # online
            ("evaluate", 100),  # in the evaluation before the first step
            ("evaluate", 200 + 100),  # in one within the warm-up
            ("evaluate", 600 + 100),  # in one within the online phase
        ]
    ),
)
def test_killed_it_resumes_exactly(kind: str, count: int, straight: Any, tmp_path: Path) -> None:
    assert_same(outcome(killed(written(tmp_path), tmp_path, kind, count)), straight)
