"""Environments to act in, each with recorded transitions before it or without: offline, then online, or one by one."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch

from clplat.data.environments import Gym, Maker
from clplat.data.offline import Recording, read_recording, to_data
from clplat.errors import ClplatError, UserError
from clplat.stream import Actions, Data, Experience, Kind, Stream

Timeouts = Literal["file", "limit"]


class RL(Stream):
    """One environment, first transitions recorded there and then the environment itself, or either; or several such.

    Needs `pip install clplat[rl]`, or clplat[robotics] for mazes, hands and kitchens. Agents act in [-1, 1], which is
    scaled to the environment's bounds. Returns are those of the environment, of whole episodes, not discounted.

    Args:
        env: gymnasium's id, of an environment whose actions are a vector of bounded numbers.
        env_options: arguments of the environment, such as {g: 14} of Pendulum-v1.
        physics: factors on gravity, mass and friction of a MuJoCo model, such as {mass: 1.5}.
        pixels: side of the pictures that are observed instead of what the environment gives, the last three at once, ≥
            0; 0 takes what it gives, a vector or images of bytes. Images need an encoder (backbone.encoder), and 4
            bytes a number in a memory. MuJoCo draws without a screen where MUJOCO_GL is egl.
        data: recorded transitions: .npz or .hdf5 in D4RL's layout, or a Minari folder, in the environment's units;
            looked for as named, in offline_rl/ of the data root and among Minari's. {seed} in it is the seed. null:
            none.
        timeouts: file: the data tell time limits (timeouts) from ends of the task (terminals). limit: for data that
            mark all ends alike: an end after as many steps as the environment allows is a time limit.
        env_steps: steps to take in the environment, ≥ 0; 0 takes none and only evaluates there.
        envs: environments that step side by side, ≥ 1; more than one step in processes of their own, while the steps
            of training that the round before asked for are taken.
        probe: transitions of the data, ≥ 0, on which errors of the values are measured; nothing learns from them.
        learn_from_data: false uses nothing of the data but the probe (what was learned of them is in `start.run`, say).
        returns: mean returns of a random and of an expert policy, which normalise the return; empty takes what the data
            say of it, if anything.
        sequence: for each experience a dict of what differs there of all the above; empty: one experience. An entry may
            also have a name.
        seed: of the probe; null takes the run's.
        data_root: null is $CLPLAT_DATA.

    Raises:
        UserError: unknown environment, data that do not fit it or have NaNs, ends of episodes that are not marked.
        MissingError: data or a package are not there.
    """

    kinds = frozenset({Kind.INTERACT})

    def __init__(
        self,
        *,
        env: str = "Pendulum-v1",
        env_options: dict[str, Any] = {},  # noqa: B006
        physics: dict[str, float] = {},  # noqa: B006
        pixels: int = 0,
        data: str | None = None,
        timeouts: Timeouts = "file",
        env_steps: int = 10_000,
        envs: int = 1,
        probe: int = 2048,
        learn_from_data: bool = True,
        returns: list[float] = [],  # noqa: B006
        sequence: list[dict[str, Any]] = [],  # noqa: B006
        seed: int | None = None,
        data_root: str | None = None,
    ) -> None:
        shared = {
            "env": env, "env_options": env_options, "physics": physics, "pixels": pixels, "data": data,
            "timeouts": timeouts, "env_steps": env_steps, "envs": envs, "probe": probe,
            "learn_from_data": learn_from_data, "returns": returns,
        }  # fmt: skip
        experiences, sizes, gyms = [], [], []
        for index, entry in enumerate(sequence or [{}]):
            unknown = sorted(set(entry) - set(shared) - {"name"})
            if unknown:
                raise UserError(f"stream.sequence: entry {index} has {unknown} (valid: name, {', '.join(shared)})")
            one = _One(index, {**shared, **entry}, seed or 0, data_root)
            experiences.append(one.experience)
            sizes.append((one.gym.shape, one.gym.actions))
            gyms.append(one.gym)
        names = [e.name for e in experiences]
        experiences = [replace(e, name=f"{e.name}_{e.index}") if names.count(e.name) > 1 else e for e in experiences]
        if len(set(sizes)) > 1:
            raise UserError(f"stream.sequence: sizes of observations and actions {sizes} differ (valid: the same)")
        super().__init__(experiences, num_classes=0, input_shape=sizes[0][0])
        self.answers = Actions(sizes[0][1])
        bounds = {key: [getattr(g, key).tolist() for g in gyms] for key in ("low", "high")}
        self.origin = {"acting": {**gyms[0].raw(), **bounds, "dtype": str(gyms[0].low.dtype)}}


class _One:
    """One experience, from its options."""

    def __init__(self, index: int, given: dict[str, Any], seed: int, data_root: str | None) -> None:
        for key, least in (("env_steps", 0), ("envs", 1), ("probe", 0), ("pixels", 0)):
            value = given[key]
            _require(key, value, isinstance(value, int) and value >= least, f"≥ {least}")
        bounds = given["returns"]
        _require("returns", bounds, len(bounds) in (0, 2) and (not bounds or bounds[0] < bounds[1]),
                 "[random, expert], the second above the first, or empty")  # fmt: skip
        _require("timeouts", given["timeouts"], given["timeouts"] in ("file", "limit"), "file, limit")
        maker = Maker(given["env"], given["env_options"], given["physics"], given["pixels"])
        self.gym = maker()
        _tried(self.gym, given)
        train, probe, returns = None, None, tuple(bounds) or None
        if given["data"] is not None:
            recording = read_recording(
                str(given["data"]).replace("{seed}", str(seed)), data_root, ends=given["timeouts"], limit=self.gym.limit
            )
            train = _fitted(recording, self.gym, maker.name)
            returns = returns or recording.returns
            if given["probe"]:
                drawn = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
                probe = Data(train.inputs, None, drawn[: given["probe"]].sort().values)
        self.experience = Experience(
            index, str(given.get("name", maker.name)), Kind.INTERACT, train if given["learn_from_data"] else None,
            probe=probe, environment=maker, environments=given["envs"], env_steps=given["env_steps"],
            return_bounds=returns, task=index,
        )  # fmt: skip


def _tried(gym: Gym, given: dict[str, Any]) -> None:
    """Take a step: what options of a wrong type do, and pictures that can't be drawn, is said before the run."""
    try:
        gym.reset(seed=0)
        gym.step(np.zeros(gym.actions))
    except ClplatError:
        raise
    except Exception as error:
        if not given["env_options"]:
            raise
        raise UserError(
            f"stream.env_options: {given['env']} fails with {given['env_options']} ({type(error).__name__}: "
            f"{' '.join(str(error).split())}; valid: the arguments of the environment)"
        ) from error


def _fitted(recording: Recording, gym: Gym, name: str) -> Data:
    """The recording as data for this environment."""
    if len(gym.shape) > 1:
        raise UserError(f"stream.data: {name} is observed as images, and recorded images are not read (valid: null)")
    found = [recording.arrays[k].shape[1] for k in ("observations", "next_observations", "actions")]
    valid = [*gym.shape, *gym.shape, gym.actions]
    if found != valid:
        raise UserError(
            f"stream.data: {recording.path} has {found[0]} numbers in observations and {found[2]} in actions, {name} "
            f"{valid[0]} and {valid[2]} (valid: data of this environment)"
        )
    if recording.dropped:
        warnings.warn(
            f"stream.data: {recording.path} records no next observations: the last step of {recording.dropped} "
            "episodes that were cut off is left out",
            stacklevel=2,
        )
    return to_data(recording, gym.low, gym.high)


def _require(key: str, value: object, holds: bool, valid: str) -> None:
    if not holds:
        raise UserError(f"stream.{key}: {value!r} is out of range (valid: {valid})")
