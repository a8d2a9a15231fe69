"""Stream `rl`: recorded transitions fit their environment or are refused, and what is read is what was recorded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from clplat import Kind
from clplat.config import discovery
from clplat.data.transitions import unpack
from clplat.errors import ClplatError, MissingError, UserError

pytest.importorskip("gymnasium", reason="needs the extra rl")
LIMIT = 200  # of Pendulum


def recording(episodes: int = 2, length: int = LIMIT, seed: int = 0) -> dict[str, np.ndarray]:
    """Random actions on Pendulum in D4RL's layout, in its own units."""
    import gymnasium

    env, generator = gymnasium.make("Pendulum-v1"), np.random.default_rng(seed)
    rows: dict[str, list[Any]] = {k: [] for k in KEYS}
    for episode in range(episodes):
        before, _ = env.reset(seed=seed + episode)
        for at in range(length):
            action = generator.uniform(-2, 2, 1).astype(np.float32)
            after, reward, *_ = env.step(action)
            for key, value in zip(KEYS, (before, action, reward, after, False, at == length - 1), strict=True):
                rows[key].append(value)
            before = after
    return {k: np.array(v) for k, v in rows.items()}


KEYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


def stream(**options: Any) -> Any:
    return discovery.load("streams", "rl")(**options)


def saved(folder: Path, arrays: dict[str, np.ndarray], name: str = "data.npz") -> str:
    path = folder / name
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        import h5py

        with h5py.File(path, "w") as file:
            for key, value in arrays.items():
                file[key] = value
    return str(path)


@pytest.mark.parametrize("name", ["data.npz", "data.hdf5"])
def test_what_is_read_is_what_was_recorded_with_actions_scaled(tmp_path: Path, name: str) -> None:
    arrays = recording()
    made = stream(data=saved(tmp_path, arrays, name))
    (experience,) = made
    assert experience.kind is Kind.INTERACT
    found = unpack(experience.train.all()[0], made.answers.size)
    assert torch.equal(found.action, torch.from_numpy(arrays["actions"] / 2))
    for part, key in (
        ("observation", "observations"),
        ("next_observation", "next_observations"),
        ("reward", "rewards"),
    ):
        assert np.array_equal(getattr(found, part).numpy(), arrays[key].astype(np.float32)), part
    assert np.array_equal(found.truncated.numpy().astype(bool), arrays["timeouts"])
    assert not found.terminated.any()


def test_minari_folder_gives_the_same_transitions_and_its_reference_returns(tmp_path: Path, monkeypatch: Any) -> None:
    minari = pytest.importorskip("minari", reason="needs the extra rl")
    from minari.data_collector import EpisodeBuffer

    arrays, parts = recording(), []
    for start in (0, LIMIT):
        rows = {k: v[start : start + LIMIT] for k, v in arrays.items()}
        seen = np.concatenate([rows["observations"], rows["next_observations"][-1:]])
        parts.append(EpisodeBuffer(
            id=start // LIMIT, seed=start, observations=list(seen), actions=list(rows["actions"]),
            rewards=list(rows["rewards"]), terminations=list(rows["terminals"]), truncations=list(rows["timeouts"]),
        ))  # fmt: skip
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about authors and links that are not given
        minari.create_dataset_from_buffers(
            "pendulum/random-v0", parts, env="Pendulum-v1", data_format="hdf5", ref_min_score=-1300.0,
            ref_max_score=-150.0, algorithm_name="random", author="nobody", author_email="a@b.c", code_permalink="none",
        )  # fmt: skip
    (read,), (plain,) = stream(data="pendulum/random-v0"), stream(data=saved(tmp_path, arrays))
    assert torch.equal(read.train.inputs[:, :-1], plain.train.inputs[:, :-1])
    assert read.return_bounds == (-1300.0, -150.0)
    assert plain.return_bounds is None


def test_without_next_observations_the_last_step_of_a_cut_episode_is_left_out_and_said_so(tmp_path: Path) -> None:
    arrays = recording()
    del arrays["next_observations"]
    with pytest.warns(UserWarning, match="last step of 2 episodes"):
        (experience,) = stream(data=saved(tmp_path, arrays))
    found = unpack(experience.train.all()[0], 1)
    assert len(found.reward) == 2 * (LIMIT - 1)
    assert found.truncated.nonzero().flatten().tolist() == [LIMIT - 2, 2 * (LIMIT - 1) - 1]
    assert torch.equal(found.next_observation[:100], found.observation[1:101])


def test_ends_after_the_time_limit_are_time_outs_where_asked(tmp_path: Path) -> None:
    arrays = recording()
    arrays["terminals"] = arrays.pop("timeouts")
    path = saved(tmp_path, arrays)
    with pytest.raises(UserError, match="has no timeouts"):
        stream(data=path)
    found = unpack(stream(data=path, timeouts="limit")[0].train.all()[0], 1)
    assert found.truncated.sum() == 2
    assert not found.terminated.any()


def spoilt(**changes: Any) -> dict[str, np.ndarray]:
    arrays = recording()
    for key, change in changes.items():
        arrays[key] = change(arrays[key])
    return arrays


def put(at: int, value: Any) -> Any:
    def change(values: np.ndarray) -> np.ndarray:
        values = values.copy()
        values[at] = value
        return values

    return change


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        (spoilt(rewards=put(7, np.nan)), r"rewards of .* are NaN or infinite at 1 of 400 steps \(first: 7\)"),
        (spoilt(timeouts=np.zeros_like), r"1 episodes of .* end without terminal or time-out \(first: step 199\)"),
        (spoilt(actions=lambda a: 2 * a), "outside the environment's bounds"),
        (spoilt(observations=lambda o: o[:, :2], next_observations=lambda o: o[:, :2]), "has 2 numbers"),
        (spoilt(actions=lambda a: a[:9]), "valid: one length"),
        (recording(1, LIMIT + 50), "has 250 steps, the environment's time limit is 200"),
    ],
    ids=["nan", "torn", "bounds", "space", "length", "limit"],
)  # fmt: skip
def test_bad_data_are_refused_in_one_line(tmp_path: Path, arrays: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        stream(data=saved(tmp_path, arrays))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("options", "error", "said"),
    [
        ({"env": "Nowhere-v0"}, UserError, "'Nowhere-v0' can't be made"),
        ({"env": "CartPole-v1"}, UserError, "actions Discrete"),
        ({"env_options": {"wind": 3}}, UserError, "wind"),
        ({"env_options": {"g": "ten"}}, UserError, r"env_options: Pendulum-v1 fails with \{'g': 'ten'\} \(TypeError"),
        ({"physics": {"mass": 2}}, UserError, "no MuJoCo model"),
        ({"data": "nothing.npz"}, MissingError, "nothing.npz is missing"),
        ({"sequence": [{"gravity": 3}]}, UserError, r"entry 0 has \['gravity'\]"),
        ({"sequence": [{}, {"env": "MountainCarContinuous-v0"}]}, UserError, "differ"),
        ({"returns": [3, 2]}, UserError, "the second above the first"),
        ({"env_steps": -1}, UserError, "env_steps"),
    ],
)  # fmt: skip
def test_bad_options_are_refused_in_one_line(options: dict[str, Any], error: type[ClplatError], said: str) -> None:
    with pytest.raises(error, match=said) as caught:
        stream(**options)
    assert len(str(caught.value).splitlines()) == 1


def test_a_sequence_changes_what_it_names(tmp_path: Path) -> None:
    made = stream(env_steps=7, sequence=[{"env_options": {"g": 6.0}}, {"env_options": {"g": 14.0}, "env_steps": 9}])
    assert [e.env_steps for e in made] == [7, 9]
    assert len({e.name for e in made}) == 2
    assert [e.environment().env.unwrapped.g for e in made] == [6.0, 14.0]


def test_what_is_kept_for_measurement_no_strategy_sees(tmp_path: Path) -> None:
    (experience,) = stream(data=saved(tmp_path, recording()), probe=50, learn_from_data=False, seed=3)
    assert experience.train is None
    assert len(experience.probe) == 50
    assert experience.seen().probe is None


def test_a_run_on_bad_data_says_one_line_and_exits_with_two(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Not a second one, of what else could not be built without the stream."""
    from clplat.cli import main

    path = saved(tmp_path, spoilt(rewards=put(7, np.nan)))
    options = ["--stream", "rl", "--stream.data", path, "--backbone", "actor_critic", "--strategy", "wsrl"]
    assert main(["run", *options, "--output", str(tmp_path / "runs")]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert "rewards of" in said[0]
    assert main(["run", *options[:2], "--stream.data", str(tmp_path / "none.npz"), *options[4:]]) == 3
    (said,) = capsys.readouterr().err.splitlines()
    assert "none.npz is missing" in said
