"""Gymnasium's environments as agents meet them: actions in [-1, 1], observations flat float32, physics changed at will.

MuJoCo's and classic control's can be saved within an episode: what is restored goes on bit for bit.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.pixels import STACK, Pictures, layout_of, scaled
from clplat.errors import MissingError, UserError

PHYSICS = ("gravity", "mass", "friction")  # of a MuJoCo model
_ROBOTICS = "; mazes, hands and kitchens need pip install 'clplat[robotics]'"
_PLAIN = (bool, int, float, str, type(None))


@dataclass(frozen=True)
class Maker:
    """Makes an environment, in this process or another.

    Args:
        name: gymnasium's id.
        options: arguments of `gymnasium.make`.
        physics: factors, > 0, on what a MuJoCo model has of `PHYSICS`.
        pixels: side of the pictures that are observed, ≥ 0; 0 observes what the environment gives.
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    physics: Mapping[str, float] = field(default_factory=dict)
    pixels: int = 0

    def __call__(self) -> Gym:
        return self.rendered() if self.pixels else Gym(self)

    def rendered(self) -> Gym:
        """One that also draws pictures, without a screen: see `Gym.render`.

        Raises:
            UserError: the environment draws none.
        """
        if "rgb_array" not in Gym(replace(self, pixels=0)).env.metadata.get("render_modes", []):
            key = "stream.pixels" if self.pixels else "loop.eval_frames"
            raise UserError(f"{key}: {self.name} draws no pictures (valid: 0)")
        return Gym(replace(self, options={**self.options, "render_mode": "rgb_array"}))


class Gym:
    """One environment.

    Raises:
        UserError: unknown, refused options, spaces that are not vectors of numbers, physics that it does not have.
        MissingError: it needs what is not installed.
    """

    def __init__(self, maker: Maker) -> None:
        import gymnasium

        self.env = _make(maker)
        base: Any = self.env.unwrapped
        spaces = gymnasium.spaces
        space, actions = self.env.observation_space, self.env.action_space
        box, self._layout = isinstance(space, spaces.Box), None
        self._pictures = Pictures(maker.pixels) if maker.pixels else None
        if box and len(space.shape) == 3 and not maker.pixels:
            self._layout = layout_of(maker.name, space)
        self._flatten = None if (box and len(space.shape) == 1) or self._layout else spaces.flatten
        flat = spaces.flatten_space(space)
        if not isinstance(flat, spaces.Box) or not isinstance(actions, spaces.Box) or len(actions.shape) != 1:
            raise UserError(f"stream.env: {maker.name} has observations {space} and actions {actions} (valid: numbers "
                            "for observations, a vector of bounded numbers for actions)")  # fmt: skip
        if not (np.isfinite(actions.low).all() and np.isfinite(actions.high).all()):
            raise UserError(f"stream.env: {maker.name} has actions without bounds, {actions} (valid: bounded ones)")
        self.shape, self.actions = self._shape(flat), actions.shape[0]
        self.limit = None if self.env.spec is None else self.env.spec.max_episode_steps
        self.low, self.high = actions.low, actions.high
        self._mujoco = hasattr(base, "model") and hasattr(base, "data") and type(base.data).__name__ == "MjData"
        _change(base, maker, self._mujoco)
        control = type(base).__module__.startswith("gymnasium.envs.classic_control")
        self.savable = control or (self._mujoco and type(base).__module__.startswith("gymnasium.envs.mujoco"))

    def _shape(self, flat: Any) -> tuple[int, ...]:
        """Of an observation: (o,), or (C, H, W) of an image."""
        if self._pictures is not None:
            return (3 * STACK, self._pictures.side, self._pictures.side)
        own = self.env.observation_space.shape
        return flat.shape if self._layout is None else own if self._layout == "first" else (own[2], own[0], own[1])

    def reset(self, *, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """The first observation of an episode, float32: (o,), or an image (C, H, W) in [0, 1]."""
        observation, info = self.env.reset(seed=seed)
        return self._seen(observation, first=True), info

    def step(self, action: Any) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """`action` (a,) in [-1, 1]; what lies beyond is cut."""
        observation, reward, terminated, truncated, info = self.env.step(self.real(action))
        return self._seen(observation), float(reward), bool(terminated), bool(truncated), info

    def real(self, actions: Any) -> np.ndarray:
        """Actions (..., a) in [-1, 1] in the environment's own units."""
        return in_units(np.asarray(actions), self.low, self.high)

    def flattened(self) -> Any:
        """The environment for others, whose observations are vectors as here.

        Raises:
            UserError: they are images.
        """
        if len(self.shape) > 1:
            raise UserError(f"env: {self.env.spec.id} is observed as images (valid: an environment of vectors)")
        from gymnasium.wrappers import FlattenObservation

        return self.env if self._flatten is None else FlattenObservation(self.env)

    def raw(self) -> dict[str, Any]:
        """What an observation is before it is flattened, where that can be said as data: its shape, or its keys."""
        import gymnasium

        space, spaces = self.env.observation_space, gymnasium.spaces
        if len(self.shape) == 3:
            return {"shape": list(space.shape if self._layout else self.shape), "channels": self._layout or "first"}
        if isinstance(space, spaces.Box):
            return {"shape": list(space.shape)}
        plain = isinstance(space, spaces.Dict) and all(isinstance(s, spaces.Box) for s in space.values())
        return {"keys": list(space)} if plain else {}

    def render(self) -> np.ndarray:
        """A picture (H, W, 3) of bytes.

        Raises:
            MissingError: what draws it is not installed, or finds no graphics library.
        """
        name = self.env.spec.id if self.env.spec is not None else type(self.env.unwrapped).__name__
        key = "loop.eval_frames" if self._pictures is None else "stream.pixels"
        try:
            with warnings.catch_warnings(action="ignore"):  # of libraries that were tried before the one that draws
                picture = self.env.render()
        except Exception as error:  # graphics libraries raise errors of all kinds
            raise MissingError(
                f"{key}: {name} can't be rendered here ({_line(error)[:160]}): install what it names; "
                "MuJoCo renders without a screen where MUJOCO_GL is egl or osmesa"
            ) from error
        return np.asarray(picture)

    def close(self) -> None:
        """Let go of what draws."""
        self.env.close()

    def state(self) -> dict[str, Any]:
        """All that the rest of an episode follows from, in tensors and plain values."""
        layers = [{k: _plain(v) for k, v in vars(layer).items() if _keeps(v)} for layer in _layers(self.env)]
        found: dict[str, Any] = {"layers": layers, "rng": _rng(self.env.unwrapped)}
        if self._mujoco:
            found["mujoco"] = _simulator(self.env.unwrapped)
        if self._pictures is not None:
            found["pictures"] = torch.from_numpy(self._pictures.seen.copy())
        return found

    def restore(self, state: Mapping[str, Any]) -> None:
        """Inverse of `state`, in an environment made alike."""
        for layer, values in zip(_layers(self.env), state["layers"], strict=True):
            vars(layer).update({k: _unplain(v) for k, v in values.items()})
        base: Any = self.env.unwrapped
        base.np_random.bit_generator.state = json.loads(state["rng"])
        if self._mujoco:
            _set_simulator(base, state["mujoco"])
        if self._pictures is not None:
            self._pictures.seen = state["pictures"].numpy().copy()

    def _seen(self, observation: Any, first: bool = False) -> np.ndarray:
        if self._pictures is not None:
            return self._pictures.add(self.render(), first)
        if self._layout is not None:
            return scaled(np.asarray(observation), self._layout)
        if self._flatten is not None:
            observation = self._flatten(self.env.observation_space, observation)
        return np.asarray(observation, dtype=np.float32)


def in_units(actions: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Actions (..., a) in [-1, 1], cut where they are not, between the bounds (a,) of an environment."""
    return ((high + low) / 2 + (high - low) / 2 * np.clip(actions, -1, 1)).astype(low.dtype)


def _make(maker: Maker) -> Any:
    """The environment with its time limit, without gymnasium's checks at every step."""
    try:
        import gymnasium
    except ImportError as error:
        raise MissingError(f"stream: 'rl' needs gymnasium ({error}): pip install 'clplat[rl]'") from error
    hint = "" if maker.name in gymnasium.registry or _register_robotics(gymnasium) else _ROBOTICS
    if "mujoco" in str(getattr(gymnasium.registry.get(maker.name), "entry_point", "")):
        _quiet_mujoco()
    try:
        return gymnasium.make(maker.name, disable_env_checker=True, **maker.options)
    except gymnasium.error.DependencyNotInstalled as error:
        raise MissingError(f"stream.env: {maker.name} needs what is not installed ({_line(error)})") from error
    except Exception as error:  # an environment's own code may raise anything
        raise UserError(f"stream.env: {maker.name!r} can't be made ({_line(error)}{hint})") from error


def _register_robotics(gymnasium: Any) -> bool:
    """Mazes, hands and kitchens, where they are installed; whether they are."""
    try:
        import gymnasium_robotics
    except ImportError:
        return False
    gymnasium.register_envs(gymnasium_robotics)
    return True


def _quiet_mujoco() -> None:
    """Warnings of MuJoCo go to logging, not into a file of the working directory."""
    import logging

    try:
        import mujoco
    except ImportError:
        return
    mujoco.set_mju_user_warning(logging.getLogger("mujoco").warning)


def _line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _change(base: Any, maker: Maker, mujoco: bool) -> None:
    """Multiply what `maker.physics` names."""
    if not maker.physics:
        return
    wrong = {k: v for k, v in maker.physics.items() if k not in PHYSICS or not _positive(v)}
    if wrong:
        raise UserError(f"stream.physics: {wrong} (valid: factors > 0 of {', '.join(PHYSICS)})")
    if not mujoco:
        raise UserError(f"stream.physics: {maker.name} is no MuJoCo model (valid: env_options, of its own arguments)")
    import mujoco as library

    factors = {"gravity": 1.0, "mass": 1.0, "friction": 1.0} | dict(maker.physics)
    base.model.opt.gravity[:] *= factors["gravity"]
    base.model.body_mass[:] *= factors["mass"]
    base.model.body_inertia[:] *= factors["mass"]
    base.model.geom_friction[:] *= factors["friction"]
    library.mj_setConst(base.model, base.data)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _layers(env: Any) -> Iterator[Any]:
    """The wrappers, then the environment itself."""
    while env is not env.unwrapped:
        yield env
        env = env.env
    yield env


def _keeps(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(v, _PLAIN) for v in value)
    return isinstance(value, (*_PLAIN, np.generic)) or (isinstance(value, np.ndarray) and value.dtype.kind in "biuf")


def _plain(value: Any) -> Any:
    """A value that a checkpoint takes; {"of": type, "value": tensor or list} for what it does not know."""
    if isinstance(value, tuple):
        return {"of": "tuple", "value": [_plain(v) for v in value]}
    if isinstance(value, np.ndarray | np.generic):
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {"of": kind, "value": torch.from_numpy(np.array(value))}
    return value


def _unplain(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    if value["of"] == "tuple":
        return tuple(_unplain(v) for v in value["value"])
    array = value["value"].numpy().copy()
    return array if value["of"] == "array" else array[()]


def _rng(base: Any) -> str:
    """State of the environment's generator, whose integers are longer than a checkpoint's."""
    return json.dumps(base.np_random.bit_generator.state)


def _simulator(base: Any) -> dict[str, Tensor]:
    """MuJoCo's state, and what it has computed from it, since environments read positions a substep old."""
    import mujoco

    kind = mujoco.mjtState.mjSTATE_INTEGRATION
    values = np.empty(mujoco.mj_stateSize(base.model, kind))
    mujoco.mj_getState(base.model, base.data, values, kind)
    return {"state": torch.from_numpy(values)} | {k: torch.from_numpy(v.copy()) for k, v in _derived(base.data)}


def _set_simulator(base: Any, saved: Mapping[str, Tensor]) -> None:
    import mujoco

    mujoco.mj_setState(base.model, base.data, saved["state"].numpy(), mujoco.mjtState.mjSTATE_INTEGRATION)
    for name, values in _derived(base.data):
        if name in saved:
            values[...] = saved[name].numpy()


def _derived(data: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Arrays of a fixed size; those of contacts and constraints are made anew in each step."""
    for name in dir(data):
        if not name.startswith(("_", "efc_", "iefc_")):
            values = getattr(data, name)
            if isinstance(values, np.ndarray) and values.dtype == np.float64 and values.size and values.flags.writeable:
                yield name, values
