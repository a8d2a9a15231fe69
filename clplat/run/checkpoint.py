"""Checkpoints: a folder with `tensors.safetensors` and `state.json`, whole or absent, and checked when read.

Nothing is pickled and nothing in a checkpoint is run: a state is nested dicts and lists of tensors and plain values.
Tensors that are as they were read from a file (`sources.py`) are not in it: under `elsewhere`, the metadata of
`tensors.safetensors` name them, and tensors that share their memory with another. Of sharded tensors each process may
write its rows, into a file of its own; `state.json` names these files in the order of the processes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from clplat.components.state import flatten, unflatten
from clplat.errors import UserError
from clplat.files import sync_folder, write_atomic
from clplat.run import sources
from clplat.run.seal import digest

# What reading a file can raise that is cut, garbled or forged.
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError, SafetensorError)
KEEP = 2  # the newest, and the one before it in case the newest is damaged


_PIECE = 2**24  # bytes written and digested at once
_TYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
    torch.complex64: "C64", torch.uint16: "U16", torch.uint32: "U32", torch.uint64: "U64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
}  # fmt: skip


@dataclass
class Taken:
    """A state as it was at one moment, whatever is done to the learner since.

    Args:
        plain: the state, with references in the place of tensors.
        tensors: copies on the CPU, contiguous, by path.
        places: where tensors stand that are not copied.
        same: path → path of the tensor that it shares its memory with.
        known: what gives the files of `places`.
        own: this process's rows of sharded tensors, by path.
    """

    plain: Any
    tensors: dict[str, Tensor]
    places: dict[str, sources.Place]
    same: dict[str, str]
    known: sources.Sources | None
    own: dict[str, Tensor]


def take(state: dict[str, Any], known: sources.Sources | None = None) -> Taken:
    """Copy a state, but for tensors that are as they were read from the files that `known` knows.

    Raises:
        TypeError: the state holds something that can't be saved.
    """
    every: dict[str, Tensor] = {}
    taken = Taken(flatten(state, every), {}, {}, {}, known, {})
    first: dict[Any, str] = {}
    for path, tensor in every.items():
        if tensor.dtype not in _TYPES:
            raise TypeError(f"checkpoint: {path} holds numbers of the type {tensor.dtype}, which can't be saved")
        if (rows := own_rows(tensor)) is not None:
            taken.own[path] = rows.to("cpu", copy=True, memory_format=torch.contiguous_format)
            continue
        memory = tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device
        if tensor.numel() and (other := first.setdefault(memory, path)) != path:
            taken.same[path] = other
        elif known is not None and (place := known.place(tensor)) is not None:
            taken.places[path] = place
        else:
            taken.tensors[path] = tensor.to("cpu", copy=True, memory_format=torch.contiguous_format)
    return taken


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Write all of `state` as `write` does."""
    return write(folder, step, take(state))


def write(folder: Path, step: int, taken: Taken, parts: Callable[[Path], list[list[str]]] = lambda _: []) -> Path:
    """Write checkpoint number `step` under `folder`, then drop all but the newest `KEEP`; `taken` is used up.

    Args:
        parts: has the processes write what each has its own rows of into a folder; names and digests of the files.

    Raises:
        UserError: the disk is full, or a file that weights were read from has changed; earlier checkpoints are
            untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final, part = folder / f"{step:010d}", folder / f".{step:010d}.{os.getpid()}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir()
        told, body, found = parts(part), json.dumps(taken.plain), hashlib.sha256()
        elsewhere = {"elsewhere": json.dumps(_elsewhere(taken))} if taken.places or taken.same else {}
        write_atomic(part / "tensors.safetensors", _pieces(taken.tensors, elsewhere, found))
        outer = {"state_sha256": _sha(body.encode()), "tensors_sha256": found.hexdigest(), "state": body}
        write_atomic(part / "state.json", json.dumps(outer | ({"parts": told} if told else {})))
        if final.exists():  # written by an earlier attempt at this very step: the new one is as good
            shutil.rmtree(final)
        part.rename(final)
        sync_folder(folder)
    except OSError as error:
        raise UserError(f"output: could not write {final}: {error.strerror}; the run can be resumed") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in _numbered(folder)[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def write_own(folder: Path, taken: Taken, rank: int) -> list[str]:
    """Write what this process has its own rows of; name and digest of the file. `taken` is used up."""
    found, name = hashlib.sha256(), f"part-{rank:05d}.safetensors"
    write_atomic(folder / name, _pieces(taken.own, {}, found))
    return [name, found.hexdigest()]


def own_rows(tensor: Any) -> Tensor | None:
    """The rows that this process holds of a sharded tensor; None of one that it holds whole."""
    if not hasattr(tensor, "to_local"):
        return None
    if any(not p.is_shard(0) for p in tensor.placements):
        raise TypeError(f"checkpoint: a tensor is split by {tensor.placements}, not by rows")
    return tensor.to_local()


def _pieces(tensors: dict[str, Tensor], metadata: dict[str, str], found: Any) -> Iterator[bytes | memoryview]:
    """A file of tensors in the format of safetensors, piece by piece; each tensor is let go once it is written.

    Args:
        found: takes the digest.
    """
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    order, end = sorted(tensors, key=lambda path: (-tensors[path].element_size(), path)), 0
    for path in order:  # the widest first, so that all are aligned
        tensor = tensors[path]
        start, end = end, end + tensor.nbytes
        entries[path] = {"dtype": _TYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    head = json.dumps(entries).encode()
    head += b" " * (-len(head) % 8)
    found.update(head := len(head).to_bytes(8, "little") + head)
    yield head
    for path in order:
        raw: Any = tensors.pop(path).view(-1).view(torch.uint8).numpy()
        content = memoryview(raw)
        for start in range(0, len(content), _PIECE):
            found.update(piece := content[start : start + _PIECE])
            yield piece


def _elsewhere(taken: Taken) -> dict[str, Any]:
    files = list(dict.fromkeys(place.file for place in taken.places.values()))
    facts = [taken.known.facts(file) for file in files] if taken.known is not None else []
    named = {p: [files.index(at.file), at.name, at.transposed, at.dtype] for p, at in taken.places.items()}
    return {"files": facts, "tensors": named, "same": taken.same}


def load_newest(
    folder: Path, fault: Callable[[dict[str, Any]], str | None] = lambda state: None
) -> tuple[dict[str, Any] | None, list[str]]:
    """State of the newest whole checkpoint under `folder` (None if there is none), and a line for each passed over.

    Args:
        fault: why a state that is whole can't be gone on with, or None.

    Raises:
        UserError: a checkpoint, or the folder, is a link: it may lead to what is not this run's. Or a file that weights
            were read from is another by now.
        MissingError: such a file is not there.
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
    file, outer = path / "tensors.safetensors", json.loads((path / "state.json").read_text())
    if digest(file) != outer["tensors_sha256"]:
        raise ValueError("tensors.safetensors does not match its checksum")
    if _sha(outer["state"].encode()) != outer["state_sha256"]:
        raise ValueError("state.json does not match its checksum")
    plain = json.loads(outer["state"])
    with safe_open(file, "pt") as held:
        tensors = {name: held.get_tensor(name).clone() for name in held.keys()}  # noqa: SIM118 - it is no dict
        elsewhere = json.loads((held.metadata() or {}).get("elsewhere", "null"))
    tensors |= _joined(path, outer.get("parts", []))
    if elsewhere is not None:
        tensors |= sources.read(elsewhere, unflatten(plain["items"].get("config"), {}))
        tensors |= {name: tensors[other] for name, other in elsewhere["same"].items()}
    state = unflatten(plain, tensors)
    if not isinstance(state, dict):
        raise ValueError(f"it holds a {type(state).__name__} where a run's state should be")
    return state


def _joined(folder: Path, parts: list[list[str]]) -> dict[str, Tensor]:
    """Tensors whose rows are in several files, in the order of these."""
    rows: dict[str, list[Tensor]] = {}
    for name, expected in parts:
        if Path(name).name != name or (folder / name).is_symlink():
            raise ValueError(f"{name} is no file of the checkpoint")
        if digest(folder / name) != expected:
            raise ValueError(f"{name} does not match its checksum")
        with safe_open(folder / name, "pt") as held:
            for path in held.keys():  # noqa: SIM118 - it is no dict
                rows.setdefault(path, []).append(held.get_tensor(path))
    return {path: torch.cat(rows.pop(path)) for path in list(rows)}


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
