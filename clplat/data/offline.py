"""Recorded transitions: .npz and HDF5 in D4RL's layout, and Minari's folders, in the units of their environment.

D4RL's arrays, episodes one behind the other: observations (n, o), actions (n, a), rewards, terminals, timeouts (n,) and
next_observations (n, o). A terminal ends the task, a time-out only the episode. Minari: a group for each episode, with
one observation more than actions.

Shapes: n steps, o numbers of an observation, a of an action.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from clplat.data.datasets import find_root, read_npz
from clplat.data.transitions import Transitions, pack
from clplat.errors import MissingError, UserError
from clplat.stream import Data

Ends = Literal["file", "limit"]
_ARRAYS = ("observations", "actions", "rewards", "terminals")
_OPTIONAL = ("timeouts", "next_observations")


@dataclass(frozen=True, eq=False)
class Recording:
    """Steps of whole episodes, and what their file says of them.

    Args:
        path: where they were read.
        arrays: `observations`, `actions`, `rewards`, `next_observations`, `terminals` and `timeouts`.
        returns: mean returns of a random and of an expert policy; None where the file says nothing.
        dropped: last steps of episodes that had no next observation.
    """

    path: Path
    arrays: Mapping[str, np.ndarray]
    returns: tuple[float, float] | None = None
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.arrays["rewards"])


def read_recording(path: str, data_root: str | None, *, ends: Ends = "file", limit: int | None = None) -> Recording:
    """A recording, checked: whole numbers of finite steps, and an end wherever an episode breaks off.

    Args:
        path: .npz, .hdf5 or .h5, or a folder in Minari's format; looked for as it is, in `offline_rl` of the data root
            and among Minari's own.
        ends: "file" takes terminals and time-outs as they stand. "limit" is for files that mark each end alike: an end
            after `limit` steps is a time-out, an earlier one a terminal.

    Raises:
        MissingError: nothing there, or it can't be read.
        UserError: NaN or infinite numbers, shapes that don't fit, episodes that end without terminal or time-out.
    """
    found = _find(path, data_root)
    if found.is_dir():
        recording = _read_minari(found)
    else:
        recording = _from_arrays(found, read_npz(found, _ARRAYS) if found.suffix == ".npz" else _read_hdf5(found), ends)
    _check_numbers(recording)
    if ends == "limit":
        recording = _by_limit(recording, limit)
    _check_ends(recording, limit)
    return recording


def to_data(recording: Recording, low: np.ndarray, high: np.ndarray) -> Data:
    """Packed transitions (n, w) with actions scaled from [`low`, `high`] (a,) to [-1, 1].

    Raises:
        UserError: actions beyond these bounds by more than rounding, or of another length.
    """
    arrays, actions = recording.arrays, np.asarray(recording.arrays["actions"], dtype=np.float64)
    beyond = np.maximum(actions - high, low - actions).max()
    if beyond > 1e-4 * (high - low).max():
        raise UserError(
            f"stream.data: actions of {recording.path} lie outside the environment's bounds by {beyond:.3g} "
            f"(valid: its own units, in {low.tolist()} to {high.tolist()})"
        )
    scaled = np.clip((actions - (high + low) / 2) / ((high - low) / 2), -1, 1)
    columns = (arrays["observations"], scaled, arrays["rewards"], arrays["next_observations"], arrays["terminals"],
               arrays["timeouts"], np.full(len(recording), np.nan))  # fmt: skip
    return Data(pack(Transitions(*(torch.from_numpy(np.asarray(c, dtype=np.float32)) for c in columns))), None)


def _find(path: str, data_root: str | None) -> Path:
    own = Path(path).expanduser()
    root = find_root(data_root)
    minari = Path(os.environ.get("MINARI_DATASETS_PATH", "~/.minari/datasets")).expanduser()
    places = [own, *([root / "offline_rl" / own] if root is not None else []), minari / own]
    found = next((p for p in places if p.exists()), None)
    if found is None:
        raise MissingError(f"stream.data: {path} is missing: put it at {' or '.join(map(str, places))}")
    if not found.is_dir() and found.suffix not in (".npz", ".hdf5", ".h5"):
        raise UserError(f"stream.data: {path!r} is of an unknown type (valid: .npz, .hdf5, .h5, a Minari folder)")
    return found


def _from_arrays(path: Path, arrays: Mapping[str, np.ndarray], ends: Ends) -> Recording:
    """D4RL's layout. Where next observations are not recorded, they are those of the step after, and the last step of
    an episode that was cut off has none: it is dropped, as D4RL does, and the one before is the last."""
    n = len(arrays["rewards"])
    if "timeouts" not in arrays and ends == "file":
        raise UserError(
            f"stream.data: {path} has no timeouts, so a time limit can't be told from a task's end (valid: an array "
            "timeouts (n,), or stream.timeouts limit where each end after the environment's limit is one)"
        )
    wrong = {k: v.shape for k, v in arrays.items() if k in (*_ARRAYS, *_OPTIONAL) and len(v) != n}
    if wrong:
        raise UserError(f"stream.data: {path} has {n} rewards and {wrong} (valid: one length)")
    kept = {k: np.asarray(arrays[k]) for k in _ARRAYS}
    kept["terminals"] = kept["terminals"].astype(bool)
    kept["timeouts"] = np.asarray(arrays.get("timeouts", np.zeros(n))).astype(bool) & ~kept["terminals"]
    if "next_observations" in arrays:
        return Recording(path, kept | {"next_observations": np.asarray(arrays["next_observations"])})
    following = np.concatenate([kept["observations"][1:], kept["observations"][-1:]])
    whole = ~kept["timeouts"]
    whole[-1] &= kept["terminals"][-1]
    last = np.append(~whole[1:], False)  # the step before one that is dropped
    kept["timeouts"] = last & ~kept["terminals"]
    kept = {k: v[whole] for k, v in (kept | {"next_observations": following}).items()}
    return Recording(path, kept, dropped=int((~whole).sum()))


def _read_hdf5(path: Path) -> dict[str, np.ndarray]:
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            return {k: file[k][()] for k in _required(path, file, _ARRAYS) + [k for k in _OPTIONAL if k in file]}
    except OSError as error:
        raise MissingError(f"stream.data: {path} can't be read ({error}): replace it by a whole file") from error


def _read_minari(folder: Path) -> Recording:
    """All episodes of a Minari data set in HDF5; observations of several parts are joined in the order of their names,
    as gymnasium flattens them."""
    inner = folder / "data" if (folder / "data").is_dir() else folder
    path, facts = inner / "main_data.hdf5", inner / "metadata.json"
    if not path.is_file():
        raise MissingError(f"stream.data: {folder} has no data/main_data.hdf5 (valid: a Minari data set in HDF5)")
    parts: dict[str, list[np.ndarray]] = {k: [] for k in (*_ARRAYS, *_OPTIONAL)}
    h5py = _h5py()
    try:
        with h5py.File(path, "r") as file:
            for name in sorted((k for k in file if k.startswith("episode_")), key=lambda k: int(k.split("_")[1])):
                group = file[name]
                _required(path, group, ("observations", "actions", "rewards", "terminations", "truncations"))
                seen = _joined(group["observations"])
                parts["observations"].append(seen[:-1])
                parts["next_observations"].append(seen[1:])
                for key, own in (("actions", "actions"), ("rewards", "rewards"), ("terminals", "terminations"),
                                 ("timeouts", "truncations")):  # fmt: skip
                    parts[key].append(group[own][()])
                if not (parts["terminals"][-1][-1] or parts["timeouts"][-1][-1]):  # the recording was cut off there
                    parts["timeouts"][-1][-1] = True
        said = json.loads(facts.read_text()) if facts.is_file() else {}
    except (OSError, ValueError) as error:
        raise MissingError(f"stream.data: {folder} can't be read ({error}): replace it by a whole data set") from error
    if not parts["rewards"]:
        raise MissingError(f"stream.data: {folder} holds no episode")
    arrays = {k: np.concatenate(v) for k, v in parts.items()}
    arrays["timeouts"] = arrays["timeouts"] & ~arrays["terminals"]
    low, high = said.get("ref_min_score"), said.get("ref_max_score")
    return Recording(folder, arrays, None if low is None or high is None else (float(low), float(high)))


def _joined(node: Any) -> np.ndarray:
    """(T + 1, o) of a data set, or of a group of them."""
    if hasattr(node, "keys"):
        return np.concatenate([_joined(node[k]) for k in sorted(node)], axis=1)
    values = np.asarray(node[()])
    return values.reshape(len(values), -1)


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise MissingError(f"stream.data: HDF5 needs h5py ({error}): pip install 'clplat[rl]'") from error
    return h5py


def _required(path: Path, node: Any, keys: tuple[str, ...]) -> list[str]:
    absent = [k for k in keys if k not in node]
    if absent:
        raise MissingError(f"stream.data: {path} lacks {', '.join(absent)} (it has: {', '.join(sorted(node))})")
    return list(keys)


def _check_numbers(recording: Recording) -> None:
    n = len(recording)
    if n == 0:
        raise UserError(f"stream.data: {recording.path} holds no step")
    for key, values in recording.arrays.items():
        if values.dtype.kind not in "biuf" or values.ndim != (2 if "ations" in key or key == "actions" else 1):
            raise UserError(
                f"stream.data: {key} of {recording.path} are {values.dtype} {values.shape} (valid: numbers; observa"
                "tions and actions are vectors)"
            )
        bad = np.flatnonzero(~np.isfinite(values).reshape(n, -1).all(1))
        if len(bad):
            raise UserError(
                f"stream.data: {key} of {recording.path} are NaN or infinite at {len(bad)} of {n} steps "
                f"(first: {bad[0]})"
            )


def _by_limit(recording: Recording, limit: int | None) -> Recording:
    """Each end after `limit` steps is a time-out, each earlier one a terminal."""
    if limit is None:
        raise UserError("stream.timeouts: limit, but the environment has no time limit (valid: file)")
    arrays = dict(recording.arrays)
    ends = arrays["terminals"] | arrays["timeouts"]
    last = np.flatnonzero(ends)
    late = last[np.diff(last, prepend=-1) >= limit]
    arrays["timeouts"] = np.zeros_like(ends)
    arrays["timeouts"][late] = True
    arrays["terminals"] = ends & ~arrays["timeouts"]
    return replace(recording, arrays=arrays)


def _check_ends(recording: Recording, limit: int | None) -> None:
    """Where a step does not begin where the one before ended, an episode ended; so does the last of the file."""
    arrays = recording.arrays
    ends = arrays["terminals"] | arrays["timeouts"]
    torn = (arrays["observations"][1:] != arrays["next_observations"][:-1]).any(1) & ~ends[:-1]
    if torn.any():
        first = int(np.flatnonzero(torn)[0])
        raise UserError(
            f"stream.data: {int(torn.sum())} episodes of {recording.path} end without terminal or time-out (first: "
            f"step {first}); returns would run on into the next (valid: timeouts at the last step of each)"
        )
    if not ends[-1]:  # the data end there: more would have followed
        arrays["timeouts"][-1] = ends[-1] = True
    longest = int(np.diff(np.flatnonzero(ends), prepend=-1).max())
    if limit is not None and longest > limit:
        raise UserError(
            f"stream.data: an episode of {recording.path} has {longest} steps, the environment's time limit is {limit}"
            ": time-outs are missing (valid: timeouts at the last step of each episode)"
        )
