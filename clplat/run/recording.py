"""Episodes as Minari data sets, written whole or not at all: what an agent does in an environment, or what it met.

Shapes: T steps of an episode, o numbers of an observation, a of an action.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.datasets import find_root
from clplat.data.environments import Gym, Maker
from clplat.data.transitions import unpack
from clplat.errors import MissingError, UserError
from clplat.files import sync_folder, write_atomic
from clplat.run import checkpoint

LEAST_EPISODES = 10  # of a data set, and of a mean return


@dataclass(frozen=True, eq=False)
class Episode:
    """One episode, in the units of its environment.

    Args:
        observations: (T + 1, o), the last of them after the last step.
        actions: (T, a).
        rewards: (T,).
        terminated: whether the task ended with it; else it was cut off.
        seed: that the environment was reset with; None where nobody knows.
    """

    observations: np.ndarray
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    seed: int | None = None

    def __len__(self) -> int:
        return len(self.rewards)


def offline_root(data_root: str | None) -> Path:
    """The folder of recorded transitions below the data root.

    Raises:
        MissingError: there is no data root.
    """
    root = find_root(data_root)
    if root is None:
        raise MissingError("data_root: not set: give --data_root DIR, or set CLPLAT_DATA, to the folder for data sets")
    return root / "offline_rl"


def checked(options: Mapping[str, Any]) -> Gym:
    """The environment of a stream `rl`, for which data sets can be written. Raises as `Gym` does, and of images."""
    _minari()
    gym = Maker(options["env"], options["env_options"])()
    if len(gym.shape) != 1:
        raise UserError(f"record: {options['env']} observes images {gym.shape} (valid: environments of vectors)")
    return gym


def trained_on(run_dir: Path) -> tuple[list[tuple[int, float]], Tensor]:
    """Of a finished run in one environment: (steps there, mean return) of each evaluation, and all transitions (n, w)
    that its agent's memory holds."""
    state, notes = checkpoint.load_newest(run_dir / "checkpoints")
    if state is None:
        raise UserError(*notes, f"record: {run_dir} holds no whole checkpoint (valid: remove it, and record anew)")
    held = int(state["strategy"]["memory.counts"][0])
    return state["record"]["returns"][0]["evaluations"], state["strategy"]["memory.stored.rows"][:held]


def mean_return(episodes: list[Episode]) -> float:
    """Mean sum of rewards."""
    return float(np.mean([e.rewards.sum(dtype=np.float64) for e in episodes]))


def play(
    gym: Gym, act: Callable[[np.ndarray], Any], steps: int, seed: int, tell: Callable[[int], None] = lambda _: None
) -> list[Episode]:
    """Whole episodes, ten at least, until `steps` steps are taken. They depend on nothing but the arguments.

    Args:
        act: gives actions (a,) in [-1, 1]; may draw from torch's generator.
        tell: called with the steps taken so far.
    """
    generator, found, taken = np.random.default_rng(seed), list[Episode](), 0
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        while taken < steps or len(found) < LEAST_EPISODES:
            start = int(generator.integers(2**31))
            observation, _ = gym.reset(seed=start)
            seen, acted, paid, over, terminated = [observation], [], [], False, False
            while not over:
                action = act(observation)
                observation, reward, terminated, truncated, _ = gym.step(action)
                seen.append(observation)
                acted.append(gym.real(action))
                paid.append(reward)
                over = terminated or truncated
            taken += len(paid)
            tell(taken)
            found.append(Episode(np.stack(seen), np.stack(acted), np.array(paid), terminated, start))
    return found


def uniform(gym: Gym) -> Callable[[np.ndarray], np.ndarray]:
    """Acts at random, by torch's generator."""
    return lambda _: (2 * torch.rand(gym.actions) - 1).numpy()


def met(rows: Tensor, gym: Gym) -> list[Episode]:
    """Episodes that lie one behind the other in packed transitions (n, w); the last may have been broken off."""
    t = unpack(rows, gym.actions)
    ends = ((t.terminated > 0) | (t.truncated > 0)).nonzero()[:, 0].tolist()
    found, start = [], 0
    for end in [e + 1 for e in ends] + ([] if ends and ends[-1] + 1 == len(rows) else [len(rows)]):
        part = slice(start, end)
        seen = torch.cat([t.observation[part], t.next_observation[end - 1 : end]]).numpy()
        found.append(Episode(seen, gym.real(t.action[part].numpy()), t.reward[part].numpy(),
                             bool(t.terminated[end - 1])))  # fmt: skip
        start = end
    return found


def write(
    root: Path, identity: str, gym: Gym, episodes: list[Episode], facts: Mapping[str, Any], scratch: Path
) -> Path:
    """The data set `identity` ("namespace/name-v0") below `root`, which is one of Minari's; whole or not at all.

    Args:
        scratch: a folder on the same disk, where it grows in one that `checkpoint.clean` takes for a leftover.
        facts: what its metadata say beside what Minari asks for; `returns` (random, expert), `algorithm` and
            `description` go to Minari's own keys.
    """
    minari = _minari()
    final, part = root / identity, scratch / f".{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    try:
        told, env = dict(facts), gym.flattened()
        low, high = told.pop("returns")
        with _datasets_in(part), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that no author is named
            made = minari.create_dataset_from_buffers(
                identity, [_buffer(e, env.observation_space.dtype) for e in episodes], env=env, data_format="hdf5",
                ref_min_score=low, ref_max_score=high, algorithm_name=told.pop("algorithm"),
                description=told.pop("description"),
            )  # fmt: skip
        data = part / identity / "data"
        told["main_data_sha256"] = hashlib.sha256((data / "main_data.hdf5").read_bytes()).hexdigest()
        made.storage.update_metadata(told)
        for file in data.iterdir():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())
        final.parent.mkdir(parents=True, exist_ok=True)
        _name_spaces(root, final.parent)
        os.replace(part / identity, final)
        sync_folder(final.parent)
    except OSError as error:
        raise UserError(f"data_root: could not write {final}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return final


def facts_of(folder: Path) -> dict[str, Any] | None:
    """What the metadata of a data set say; None where there is none."""
    path = folder / "data" / "metadata.json"
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text()))
    except ValueError as error:
        raise UserError(f"record: {path} can't be read ({error}): remove {folder}, or give another --name") from error


def _buffer(episode: Episode, dtype: Any) -> Any:
    from minari.data_collector import EpisodeBuffer

    ends = np.zeros((2, len(episode)), dtype=bool)
    ends[0 if episode.terminated else 1, -1] = True
    return EpisodeBuffer(
        seed=episode.seed, observations=list(episode.observations.astype(dtype)),
        actions=list(episode.actions), rewards=episode.rewards.astype(np.float64).tolist(),
        terminations=ends[0].tolist(), truncations=ends[1].tolist(),
    )  # fmt: skip


def _minari() -> Any:
    try:
        import minari
    except ImportError as error:
        raise MissingError(f"record: Minari's format needs minari ({error}): pip install 'clplat[rl]'") from error
    return minari


class _datasets_in:
    """Minari's own folder of data sets is another one for a while."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.before = folder, os.environ.get("MINARI_DATASETS_PATH")

    def __enter__(self) -> None:
        os.environ["MINARI_DATASETS_PATH"] = str(self.folder)

    def __exit__(self, *error: object) -> None:
        del os.environ["MINARI_DATASETS_PATH"]
        if self.before is not None:
            os.environ["MINARI_DATASETS_PATH"] = self.before


def _name_spaces(root: Path, folder: Path) -> None:
    """Each folder between a data set and `root` is a namespace of Minari's, which a file in it says."""
    while folder != root:
        if not (folder / "namespace_metadata.json").exists():
            write_atomic(folder / "namespace_metadata.json", "{}")
        folder = folder.parent
