"""Environments to act in, with the data of an offline phase before them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from clplat.data.datasets import find_root, read_npz
from clplat.data.transitions import Transitions, pack
from clplat.errors import MissingError, UserError
from clplat.stream import Actions, Data, Experience, Kind, Stream

KEYS = ("observations", "actions", "rewards", "next_observations", "terminals", "timeouts")


class Scaled:
    """A gymnasium environment whose actions lie in [-1, 1] and whose observations are float32.

    Args:
        name: gymnasium's id.
    """

    def __init__(self, name: str) -> None:
        self.env = _make(name)
        low, high = self.env.action_space.low, self.env.action_space.high  # type: ignore[attr-defined]
        self.middle, self.half = (high + low) / 2, (high - low) / 2

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """The first observation of an episode."""
        observation, info = self.env.reset(seed=seed)
        return np.asarray(observation, dtype=np.float32), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Actions beyond [-1, 1] are cut."""
        real = self.middle + self.half * np.clip(np.asarray(action), -1, 1)
        observation, reward, terminated, truncated, info = self.env.step(real)
        return np.asarray(observation, dtype=np.float32), float(reward), terminated, truncated, info


class RL(Stream):
    """One environment: first transitions that were recorded there, then the environment itself; or one of both.

    Data are an .npz with observations and next_observations (n, o), actions (n, a) in [-1, 1], rewards, terminals and
    timeouts (n,), episodes one behind the other.

    Args:
        env: gymnasium's id, of an environment with vectors for observations and actions.
        data: .npz, in the working directory or in offline_rl/ of the data root; {seed} in it is the seed. null: none.
        env_steps: steps to take in the environment, ≥ 0; 0 evaluates there and takes none.
        probe: transitions drawn from the data, ≥ 0, on which errors of the values are measured.
        learn_from_data: false uses nothing of them but the probe (they were learned from in `start.run`, say).
        returns: mean returns of a random and of an expert policy, which normalise the return; empty: unknown.
        seed: of the probe; null takes the run's.
        data_root: null is $CLPLAT_DATA.
    """

    def __init__(
        self, *, env: str = "Pendulum-v1", data: str | None = None, env_steps: int = 10_000, probe: int = 2048,
        learn_from_data: bool = True,
        returns: list[float] = [],  # noqa: B006
        seed: int = 0, data_root: str | None = None,
    ) -> None:  # fmt: skip
        _require("env_steps", env_steps, env_steps >= 0, "≥ 0")
        _require("probe", probe, probe >= 0, "≥ 0")
        _require("returns", returns, len(returns) in (0, 2), "[random, expert], or empty")
        trial = _make(env)
        shape, actions = trial.observation_space.shape, trial.action_space.shape[0]
        train = None if data is None else _read(_find(data.replace("{seed}", str(seed)), data_root), shape[0], actions)
        valid = None
        if train is not None and probe:
            drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:probe]
            valid = Data(train.inputs[drawn].clone(), None)
        learned = train if learn_from_data else None
        experience = Experience(
            0, env, Kind.INTERACT, learned, valid=valid, environment=lambda: Scaled(env), env_steps=env_steps,
            return_bounds=(returns[0], returns[1]) if returns else None,
        )  # fmt: skip
        super().__init__([experience], num_classes=0, input_shape=shape)
        self.answers = Actions(actions)


def _require(key: str, value: object, holds: bool, valid: str) -> None:
    if not holds:
        raise UserError(f"stream.{key}: {value!r} is out of range (valid: {valid})")


def _make(name: str) -> Any:
    try:
        import gymnasium
    except ImportError:
        raise MissingError("stream: rl needs gymnasium (pip install 'clplat[rl]')") from None
    try:
        env = gymnasium.make(name)
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingError(f"stream.env: {name!r} needs what is not installed: {error}") from None
    except gymnasium.error.Error as error:
        raise UserError(f"stream.env: {name!r} can't be made: {error}") from None
    spaces = (env.observation_space, env.action_space)
    if not all(isinstance(s, gymnasium.spaces.Box) and len(s.shape) == 1 for s in spaces):
        raise UserError(f"stream.env: {name!r} has spaces {spaces[0]} and {spaces[1]} (valid: vectors of numbers)")
    return env


def _find(path: str, data_root: str | None) -> Path:
    file, root = Path(path).expanduser(), find_root(data_root)
    return root / "offline_rl" / file if root is not None and not file.is_file() else file


def _read(file: Path, observations: int, actions: int) -> Data:
    arrays = read_npz(file, KEYS)
    n = len(arrays["rewards"])
    shapes = [(n, observations), (n, actions), (n,), (n, observations), (n,), (n,)]
    for key, shape in zip(KEYS, shapes, strict=True):
        if arrays[key].shape != shape:
            raise UserError(f"stream.data: {key} of {file} are {arrays[key].shape}, the environment's {shape}")
        bad = np.flatnonzero(~np.isfinite(arrays[key]).reshape(n, -1).all(1))
        if len(bad):
            raise UserError(f"stream.data: {key} of {file} are not finite at {len(bad)} steps (first: {bad[0]})")
    if np.abs(arrays["actions"]).max() > 1:
        raise UserError(f"stream.data: actions of {file} reach {np.abs(arrays['actions']).max():g} (valid: in [-1, 1])")
    ends = arrays["terminals"].astype(bool) | arrays["timeouts"].astype(bool)
    torn = (arrays["observations"][1:] != arrays["next_observations"][:-1]).any(1) & ~ends[:-1]
    if torn.any():
        raise UserError(
            f"stream.data: {file} has {int(torn.sum())} ends of episodes without a terminal or a timeout (first: step "
            f"{int(np.flatnonzero(torn)[0])}); returns would run on into the next episode (valid: timeouts at each)"
        )
    ends[-1], timeouts = True, arrays["timeouts"].astype(np.float32)
    timeouts[-1] = 1.0 if not arrays["terminals"][-1] else timeouts[-1]  # the data end there
    columns = [torch.from_numpy(np.asarray(arrays[k], dtype=np.float32)) for k in KEYS[:5]]
    return Data(pack(Transitions(*columns, torch.from_numpy(timeouts), torch.zeros(n))), None)
