"""`clplat record`: data sets that Minari and stream `rl` read, made once, and made whole whatever happens."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clplat
from clplat.cli import main
from clplat.config import discovery
from clplat.data.offline import read_recording
from clplat.data.transitions import unpack
from clplat.run import checkpoint

gymnasium = pytest.importorskip("gymnasium", reason="needs the extra rl")
minari = pytest.importorskip("minari", reason="needs the extra rl")

ENV = "sliding:Sliding-v0"  # of tests/sliding.py, which gymnasium imports by this name
KINDS = ("random", "medium", "replay", "expert")
NAME = "sliding/Sliding-v0/sac-450-0"
SMALL = ["--steps", "450", "--backbone.actor_hidden", "[16]", "--backbone.critic_hidden", "[16]", "--strategy.batch",
         "16", "--strategy.lr", "0.003", "--strategy.gamma", "0.5", "--loop.checkpoint_every", "100"]  # fmt: skip


def record(folder: Path, *more: str) -> int:
    return main(["record", ENV, *SMALL, "--data_root", str(folder), "--quiet", *more])


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    assert record(folder) == 0
    return folder


def arrays(root: Path, kind: str) -> dict[str, np.ndarray]:
    return dict(read_recording(f"{NAME}/{kind}-v0", str(root)).arrays)


def digests(root: Path) -> dict[str, str]:
    return {k: hashlib.sha256(b"".join(v.tobytes() for v in arrays(root, k).values())).hexdigest() for k in KINDS}


def facts(root: Path, kind: str) -> dict[str, Any]:
    return json.loads((root / "offline_rl" / NAME / f"{kind}-v0" / "data" / "metadata.json").read_text())


@pytest.mark.parametrize("kind", KINDS)
def test_minari_reads_it_and_makes_its_environment_again(
    recorded: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(recorded / "offline_rl"))
    assert f"{NAME}/{kind}-v0" in minari.list_local_datasets()
    data, ours = minari.load_dataset(f"{NAME}/{kind}-v0"), arrays(recorded, kind)
    episodes = list(data.iterate_episodes())
    assert data.total_steps == len(ours["rewards"]) == sum(len(e.rewards) for e in episodes)
    assert np.array_equal(np.concatenate([e.actions for e in episodes]), ours["actions"])
    assert all((e.truncations | e.terminations)[-1] for e in episodes)
    assert data.recover_environment().spec.id == "Sliding-v0"
    low, high = (data.storage.metadata[f"ref_{k}_score"] for k in ("min", "max"))
    assert minari.get_normalized_score(data, np.array([low, high])).tolist() == [0, 1]
    assert low < high


@pytest.mark.parametrize("kind", ["random", "medium", "expert"])
def test_an_episode_is_what_its_environment_does_with_these_actions(recorded: Path, kind: str) -> None:
    file = recorded / "offline_rl" / NAME / f"{kind}-v0" / "data" / "main_data.hdf5"
    import h5py

    with h5py.File(file) as content:
        group = content["episode_3"]
        env, seed = gymnasium.make("Sliding-v0"), int(group.attrs["seed"])
        seen = [env.reset(seed=seed)[0]]
        rewards = []
        for action in group["actions"][()]:
            observation, reward, *_ = env.step(action)
            seen.append(observation)
            rewards.append(reward)
        assert np.array_equal(np.stack(seen), group["observations"][()])
        assert np.array_equal(np.array(rewards), group["rewards"][()])


def test_replay_is_all_that_the_agent_met_and_nothing_else(recorded: Path) -> None:
    state, _ = checkpoint.load_newest(recorded / "offline_rl" / ".recording" / NAME / "train" / "checkpoints")
    assert state is not None
    t, ours = unpack(state["strategy"]["memory.stored.rows"][:450], 1), arrays(recorded, "replay")
    assert int(state["strategy"]["memory.counts"][0]) == len(ours["rewards"]) == 450
    assert np.array_equal(t.observation.numpy(), ours["observations"])
    assert np.array_equal(t.next_observation.numpy(), ours["next_observations"])
    assert np.array_equal(2 * t.action.numpy(), ours["actions"])
    assert np.flatnonzero(ours["timeouts"]).tolist() == [*range(19, 449, 20), 449]


def test_the_agent_behind_medium_is_the_training_run_cut_off(recorded: Path) -> None:
    """Its transitions are the first of replay; its steps are those of an evaluation."""
    (folder,) = (recorded / "offline_rl" / ".recording" / NAME).glob("medium-*")
    steps, (state, _) = int(folder.name.partition("-")[2]), checkpoint.load_newest(folder / "checkpoints")
    assert state is not None
    whole, _ = checkpoint.load_newest(folder.parent / "train" / "checkpoints")
    assert whole is not None
    rows, all_rows = (s["strategy"]["memory.stored.rows"] for s in (state, whole))
    assert torch.equal(rows[:steps], all_rows[:steps])
    assert steps in [e[0] for e in whole["record"]["returns"][0]["evaluations"]]


def test_stream_rl_takes_data_and_references_and_an_offline_agent_learns(recorded: Path, tmp_path: Path) -> None:
    stream = discovery.load("streams", "rl")(env=ENV, data=f"{NAME}/expert-v0", env_steps=0, data_root=str(recorded))
    told = facts(recorded, "expert")
    assert stream[0].return_bounds == (told["ref_min_score"], told["ref_max_score"])
    assert len(stream[0].train) == told["total_steps"] == 460
    result = clplat.run(
        stream={"name": "rl", "env": ENV, "data": f"{NAME}/expert-v0", "env_steps": 0}, strategy="bc",
        backbone={"name": "actor_critic", "actor_hidden": [8], "critic_hidden": [8]}, loop={"max_steps": 2},
        data_root=str(recorded), output=str(tmp_path), tracking={"enabled": False}, quiet=True,
    )  # fmt: skip
    assert result.metrics["normalized_return"] is not None


def test_metadata_say_where_the_data_come_from(recorded: Path) -> None:
    told = facts(recorded, "replay")
    file = recorded / "offline_rl" / NAME / "replay-v0" / "data" / "main_data.hdf5"
    assert told["main_data_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert told["clplat_config"]["seed"] == 0
    assert told["clplat_config"]["stream"]["env_steps"] == 450
    assert told["algorithm_name"] == "SAC"


def test_what_is_there_is_used_again_and_what_is_missing_is_made_again(
    recorded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = digests(recorded)
    assert record(recorded) == 0
    assert "all there already, nothing was done" in capsys.readouterr().out
    expert = recorded / "offline_rl" / NAME / "expert-v0"
    expert.rename(tmp_path / "aside")
    assert record(recorded) == 0
    assert "nothing was done" not in capsys.readouterr().out
    assert digests(recorded) == before


@pytest.mark.parametrize(
    ("more", "code", "line"),
    [
        (["--strategy.gamma", "0.9"], 2, "is of another configuration: strategy.gamma: 0.5 → 0.9"),
        (["--name", "a b"], 2, "--name: 'a b' (valid:"),
        (["--steps", "0"], 2, "--steps: 0 is out of range (valid: ≥ 1)"),
        (["--strategy", "redq"], 2, "strategy: redq, but record trains sac"),
        (["--stream.data", "x.npz"], 2, "stream.data: 'x.npz' has no meaning here"),
        (["--stream.envs", "2"], 2, "stream.envs: 2 has no meaning here"),
        (["--strategy.memory", "10"], 2, "strategy.memory: 10 loses part of the replay data (valid: ≥ 450"),
        (["--strategy.lr", "0", "--name", "other"], 2, "strategy.lr: 0.0 is out of range"),
    ],
)
def test_bad_input_is_one_line(
    recorded: Path, more: list[str], code: int, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert record(recorded, *more) == code
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1
    assert line in said[0]


def test_no_environment_and_no_data_root_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["record", "Nowhere-v0", "--data_root", str(tmp_path)]) == 2
    assert main(["record", "CartPole-v1", "--data_root", str(tmp_path)]) == 2
    assert main(["record", "sliding:Seeing-v0", "--data_root", str(tmp_path)]) == 2
    monkeypatch.delenv("CLPLAT_DATA", raising=False)
    assert main(["record", "Pendulum-v1"]) == 3
    said = capsys.readouterr().err.splitlines()
    assert [line.split(":")[1].strip() for line in said] == ["stream.env", "stream.env", "record", "data_root"]
    assert not list(tmp_path.rglob("*.hdf5"))


def test_an_agent_that_has_learned_nothing_is_no_expert(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    returns = iter([-100.0, -100.0])
    monkeypatch.setattr("clplat.run.recording.mean_return", lambda episodes: next(returns))
    assert record(tmp_path, "--steps", "20", "--name", "other") == 2
    assert "SAC has learned nothing in 20 steps: its mean return is -100.00" in capsys.readouterr().err
    assert not list(tmp_path.rglob("*.hdf5"))


# Kills itself at the given call of a function that the recording calls.
KILLER = """
import os, signal, sys
from clplat.cli import main
from clplat.config import discovery
from clplat.run import recording
cls = discovery.load("strategies", "sac")
place, countdown, number = sys.argv[1], int(sys.argv[2]), getattr(signal, sys.argv[3])
holder = {"observe": cls, "step": recording.Gym, "_name_spaces": recording}[place]
function = getattr(holder, place)

def counted(*args):
    global countdown
    countdown -= 1
    if countdown == 0:
        os.kill(os.getpid(), number)
    return function(*args)

setattr(holder, place, counted)
sys.exit(main(sys.argv[4:]))
"""
TESTS = Path(__file__).parent
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "count", "number"),
    [
        ("observe", 230, "SIGKILL"),  # in training, after its second checkpoint
        ("observe", 230, "SIGINT"),
        ("step", 2800, "SIGKILL"),  # while random actions are taken
        ("step", 2800, "SIGINT"),
        ("_name_spaces", 1, "SIGKILL"),  # the first set is written, and not in its place
        ("_name_spaces", 3, "SIGKILL"),
    ],
)
def test_killed_it_is_made_again_as_it_would_have_been(
    place: str, count: int, number: str, recorded: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", KILLER, place, str(count), number, "record", ENV, *SMALL, "--data_root",
               str(tmp_path), "--quiet"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, env=ENVIRONMENT)
    assert done.returncode == (-signal.SIGKILL if number == "SIGKILL" else 130), done.stderr
    assert not (tmp_path / "offline_rl" / NAME / "expert-v0").exists()
    assert record(tmp_path) == 0
    assert digests(tmp_path) == digests(recorded)
    assert not list(tmp_path.rglob(".*.part"))
