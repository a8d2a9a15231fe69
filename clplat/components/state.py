"""State as tensors and plain values: what a checkpoint holds, a digest of it, and the random states of a process.

A state is nested dicts and lists of tensors and plain values; nothing in it is ever run.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, str, type(None))
_TYPES = frozenset(_PLAIN)


def flatten(state: Any, tensors: dict[str, Tensor], path: str = "") -> Any:
    """The state with each tensor replaced by a reference into `tensors`, which is filled.

    Dicts may have string or integer keys; tuples come back as lists.

    Raises:
        TypeError: for a value that is neither tensor, number, string, None, list, tuple nor dict; names its path.
    """
    if isinstance(state, Tensor):
        tensors[path] = state.detach()
        return {"$tensor": path}
    if isinstance(state, dict):
        keys = "int" if state and all(isinstance(k, int) for k in state) else "str"
        if keys == "str" and not all(isinstance(k, str) for k in state):
            raise TypeError(f"checkpoint: keys of {path or 'the state'} must be all strings or all integers")
        return {"$dict": keys, "items": {str(k): flatten(v, tensors, f"{path}/{k}") for k, v in state.items()}}
    if isinstance(state, list | tuple):
        if set(map(type, state)) <= _TYPES:  # long lists of numbers, whose paths nobody asks for
            return list(state)
        return [flatten(v, tensors, f"{path}/{i}") for i, v in enumerate(state)]
    if isinstance(state, _PLAIN):
        return state
    raise TypeError(f"checkpoint: {path} holds a {type(state).__name__}; only tensors and plain values can be saved")


def unflatten(plain: Any, tensors: dict[str, Tensor]) -> Any:
    """Inverse of `flatten`."""
    if isinstance(plain, dict):
        if "$tensor" in plain:
            return tensors[plain["$tensor"]]
        key = int if plain["$dict"] == "int" else str
        return {key(k): unflatten(v, tensors) for k, v in plain["items"].items()}
    if isinstance(plain, list):
        if set(map(type, plain)) <= _TYPES:
            return list(plain)
        return [unflatten(v, tensors) for v in plain]
    return plain


def sha256(state: dict[str, Any]) -> str:
    """SHA-256 over the names and bytes of all tensors of a state, in order of their names."""
    tensors: dict[str, Tensor] = {}
    flatten(state, tensors)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.flatten().view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def rng_state() -> dict[str, Any]:
    """All random states of this process in tensors and plain values."""
    import random

    import numpy as np

    version, internal, gauss = random.getstate()
    name, keys, *rest = np.random.get_state()  # noqa: NPY002 - strategies and libraries may draw from it
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype("int64")), *rest],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Inverse of `rng_state`."""
    import random

    import numpy as np

    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype("uint32"), *rest))  # noqa: NPY002
