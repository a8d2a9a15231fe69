"""Checkpoints: a folder with `tensors.safetensors` and `state.json`, whole or absent, and checked when read.

Nothing is pickled and nothing in a checkpoint is run: a state is nested dicts and lists of tensors and plain values.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from clplat.components.state import flatten, unflatten
from clplat.errors import UserError
from clplat.files import sync_folder, write_atomic

# What reading a file can raise that is cut, garbled or forged.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, SafetensorError)
KEEP = 2  # the newest, and the one before it in case the newest is damaged


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write `state` as checkpoint number `step` under `folder`, then drop all but the newest `KEEP`.

    Raises:
        UserError: the disk is full; earlier checkpoints are untouched.
        TypeError: the state holds something that can't be saved.
    """
    tensors: dict[str, Tensor] = {}
    plain = flatten(state, tensors)
    # Copies: tied weights may be stored twice, but what shares memory is refused by the format.
    blob = save_tensors({k: v.to("cpu", copy=True).contiguous() for k, v in tensors.items()})
    body = json.dumps(plain)
    text = json.dumps({"state_sha256": _sha(body.encode()), "tensors_sha256": _sha(blob), "state": body})
    folder.mkdir(parents=True, exist_ok=True)
    final, part = folder / f"{step:010d}", folder / f".{step:010d}.{os.getpid()}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        write_atomic(part / "tensors.safetensors", blob)
        write_atomic(part / "state.json", text)
        if final.exists():  # written by an earlier attempt at this very step: the new one is as good
            shutil.rmtree(final)
        part.rename(final)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(part, ignore_errors=True)
        raise UserError(f"output: could not write {final}: {error.strerror}; the run can be resumed") from error
    for old in _numbered(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load_newest(
    folder: Path, fault: Callable[[dict[str, Any]], str | None] = lambda state: None
) -> tuple[dict[str, Any] | None, list[str]]:
    """State of the newest whole checkpoint under `folder` (None if there is none), and a line for each passed over.

    Args:
        fault: why a state that is whole can't be gone on with, or None.

    Raises:
        UserError: a checkpoint, or the folder, is a link: it may lead to what is not this run's.
    """
    notes: list[str] = []
    for path in reversed(_numbered(folder)):
        for link in (folder, path, path / "tensors.safetensors", path / "state.json"):
            if link.is_symlink():
                raise UserError(f"{link} is a link (valid: files and folders of the run itself)")
        try:
            state = _read(path)
        except _DAMAGE as error:
            notes.append(f"checkpoint {path} is damaged ({_short(error)}): looking for one before it")
            continue
        if (why := fault(state)) is None:
            return state, notes
        notes.append(f"checkpoint {path} is passed over: {why}")
    return None, notes


def _short(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


def _read(path: Path) -> dict[str, Any]:
    blob, outer = (path / "tensors.safetensors").read_bytes(), json.loads((path / "state.json").read_text())
    if _sha(blob) != outer["tensors_sha256"]:
        raise ValueError("tensors.safetensors does not match its checksum")
    if _sha(outer["state"].encode()) != outer["state_sha256"]:
        raise ValueError("state.json does not match its checksum")
    state = unflatten(json.loads(outer["state"]), load_tensors(blob))
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__} where a run's state should be")
    return state


def _numbered(folder: Path) -> list[Path]:
    """Checkpoints in order of their step; leftovers of a killed writer are not among them."""
    return sorted(p for p in folder.glob("[0-9]*") if p.is_dir()) if folder.is_dir() else []


def clean(folder: Path) -> None:
    """Remove what a killed writer left behind, checkpoints and single files, anywhere below `folder`."""
    for part in list(folder.rglob(".*.part")):
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def lock(run_dir: Path) -> IO[str]:
    """Hold the run directory for this process; the lock goes when the handle or the process does.

    Raises:
        UserError: another process holds it.
    """
    handle = open(run_dir / "run.lock", "w")  # noqa: SIM115 - the caller keeps it open
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.close()
        raise UserError(f"resume: {run_dir} is in use by another process; wait for it or stop it") from error
    return handle
