"""Tensors that are as they were read from .safetensors files: told by their content, named instead of written.

A tensor counts as unchanged where its bytes are those that the file gives, whoever holds it: the model, a frozen copy
of it, a layer that was wrapped. What was merged, cut or trained has other bytes, however it was written to. Contents
are compared, on the device that holds the tensor, by one sum a block,

    h_b = Σ_i w_i x_i mod 2⁶⁴,   x_i the 32-bit words of block b, w_i drawn from all 64-bit numbers

which two contents that differ in the block share with probability ≤ 2⁻³³: with d their difference, |d_i| < 2³², there
are at least 33 bits of w that decide whether Σ w_i d_i is 0.

Source   Carter and Wegman, "Universal classes of hash functions", JCSS 18(2), 1979.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from clplat.data.datasets import find_root
from clplat.errors import MissingError, UserError
from clplat.run.seal import digest

SMALLEST = 2**14  # bytes of a tensor that is worth naming
_BLOCK = 2**16  # words
_SAMPLES = 64  # elements that are compared first: what was trained differs in them already


class Place(NamedTuple):
    """Where a tensor stands: under `name` in `file`, there transposed or not, in that type or another."""

    file: Path
    name: str
    transposed: bool
    dtype: str  # the tensor's, as torch names it


class Sources:
    """Which tensors are as they were read.

    Args:
        files: .safetensors files that weights were read from.
        tensors: of the learner, before its first step; those found in the files are known from now on.
    """

    def __init__(self, files: Sequence[Path], tensors: Iterable[Tensor]) -> None:
        self._files = {file: _identity(file) for file in files}
        self._places: dict[bytes, Place] = {}  # by content
        self._samples: set[bytes] = set()
        wanted: dict[bytes, list[Tensor]] = {}
        for tensor in tensors if files else ():
            if tensor.nbytes >= SMALLEST:
                wanted.setdefault(_sample(tensor, tensor.dtype), []).append(tensor)
        for file in files:
            self._look(file, wanted)

    def _look(self, file: Path, wanted: dict[bytes, list[Tensor]]) -> None:
        from safetensors import safe_open

        every = [t for tensors in wanted.values() for t in tensors]
        shapes, dtypes = {tuple(t.shape) for t in every}, {t.dtype for t in every}
        with safe_open(file, "pt") as held:
            for name in held.keys():  # noqa: SIM118 - it is no dict
                shape = tuple(held.get_slice(name).get_shape())
                for transposed in (False, True)[: len(shape) if len(shape) == 2 else 1]:
                    if shape[:: -1 if transposed else 1] not in shapes:
                        continue
                    stored = held.get_tensor(name)
                    stored = stored.T if transposed else stored
                    for dtype in (d for d in dtypes if d.is_floating_point == stored.is_floating_point()):
                        key = _sample(stored, dtype)
                        for tensor in wanted.get(key, ()):
                            content = _content(tensor)
                            if content not in self._places and _same(stored.to(dtype), tensor):
                                place = Place(file, name, transposed, str(dtype).removeprefix("torch."))
                                self._places[content] = place
                                self._samples.add(key)

    def place(self, tensor: Tensor) -> Place | None:
        """Where the content of `tensor` stands; None where it has to be written."""
        if tensor.nbytes < SMALLEST or not self._places or _sample(tensor, tensor.dtype) not in self._samples:
            return None
        return self._places.get(_content(tensor))

    def facts(self, file: Path) -> dict[str, Any]:
        """What tells a file again: its path, SHA-256 and size in bytes.

        Raises:
            UserError: it is no longer the file that was read.
        """
        try:
            if _identity(file) == self._files[file]:
                return {"path": str(file.absolute()), "sha256": _sha256(file, _identity(file)), "bytes": _size(file)}
        except OSError:
            pass
        raise UserError(
            f"checkpoint: {file} was changed or taken away while a run stands on it: put it back and go on with "
            "the run (or give loop.checkpoint_whole: true, which writes such weights into each checkpoint)"
        )


def read(places: dict[str, Any], config: Any) -> dict[str, Tensor]:
    """Tensors by their path in a state.

    Args:
        places: "files" as `Sources.facts` gives them, and "tensors": path → [number of the file, name, transposed,
            dtype].
        config: of the run, as config.yaml has it: where else a file may be.

    Raises:
        MissingError: a file is not there; says what to put where.
        UserError: another file is in its place.
    """
    from safetensors import safe_open

    found: dict[str, Tensor] = {}
    for number, fact in enumerate(places["files"]):
        own = {path: rest for path, (at, *rest) in places["tensors"].items() if at == number}
        if not own:
            continue
        with safe_open(_locate(fact, config), "pt") as held:
            for path, (name, transposed, dtype) in own.items():
                stored = held.get_tensor(name)
                found[path] = (stored.T.contiguous() if transposed else stored).to(getattr(torch, dtype))
    return found


def _locate(fact: dict[str, Any], config: Any) -> Path:
    """The file of that content: where it was, or where the configuration says."""
    was, other = Path(fact["path"]), None
    for file in _candidates(was, config):
        if file.is_file():
            if _size(file) == fact["bytes"] and _sha256(file, _identity(file)) == fact["sha256"]:
                return file
            other = other or file
    what = f"the {fact['bytes']} bytes with SHA-256 {fact['sha256']}"
    if other is not None:
        raise UserError(f"checkpoint: {other} is not the file whose unchanged weights it leaves out; put {what} there")
    raise MissingError(f"checkpoint: no file at {was}, whose unchanged weights it leaves out; put {what} there")


def _candidates(was: Path, config: Any) -> Iterator[Path]:
    """Where a file may be that was at `was` when the checkpoint was written, perhaps on another machine."""
    yield was
    given = [part.get("weights") for key in ("backbone", "head") if isinstance(part := _of(config, key), dict)]
    roots = [Path(), *(root for root in (find_root(None), find_root(_of(config, "data_root"))) if root is not None)]
    for name in (n for n in given if isinstance(n, str) and n != "random"):
        for folder in (folder for root in roots for folder in (root, root / "weights")):
            place = folder / Path(name).expanduser()
            yield place / was.name if place.is_dir() else place
    cached = next((i for i, part in enumerate(was.parts) if part.startswith("models--")), None)
    if cached is not None:  # in the hub's cache, which names files alike on all machines
        from huggingface_hub.constants import HF_HUB_CACHE

        yield Path(HF_HUB_CACHE, *was.parts[cached:])


def _of(config: Any, key: str) -> Any:
    return config.get(key) if isinstance(config, dict) else None


@functools.lru_cache(maxsize=64)
def _sha256(file: Path, identity: tuple[int, ...]) -> str:
    return digest(file)


def _identity(file: Path) -> tuple[int, ...]:
    """Differs once a file is written to or replaced."""
    facts = os.stat(file)
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def _size(file: Path) -> int:
    return file.stat().st_size


def _sample(tensor: Tensor, dtype: torch.dtype) -> bytes:
    """Shape, type and a few elements of `tensor` in that type."""
    at = _spread(tensor.numel())
    taken = tensor.view(-1)[at] if tensor.is_contiguous() else tensor[torch.unravel_index(at, tensor.shape)]
    values = taken.detach().to(dtype).view(torch.uint8).cpu()
    return f"{dtype} {tuple(tensor.shape)} ".encode() + values.numpy().tobytes()


@functools.lru_cache(maxsize=256)
def _spread(count: int) -> Tensor:
    return torch.arange(_SAMPLES) * (count - 1) // (_SAMPLES - 1)


def _same(stored: Tensor, tensor: Tensor) -> bool:
    """Whether two tensors of one shape and type are the same, bit for bit."""
    return torch.equal(_bytes(stored), _bytes(tensor).cpu())


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _content(tensor: Tensor) -> bytes:
    """Shape, type and the sum of each block (module's head), taken on the tensor's device."""
    flat = _bytes(tensor if tensor.device.type in ("cpu", "cuda") else tensor.cpu())
    if flat.storage_offset() % 4 or len(flat) % 4:
        flat = torch.nn.functional.pad(flat, (0, -len(flat) % 4))
    words, weights = flat.view(torch.int32), _weights(str(flat.device))
    whole = len(words) - len(words) % _BLOCK
    rows = 1 if flat.device.type == "cpu" else 256  # what stays in a processor's cache, or keeps a device busy
    sums = [(part * weights).sum(1) for part in words[:whole].view(-1, _BLOCK).split(rows)]
    rest = words[whole:]
    sums.append((rest * weights[: len(rest)]).sum()[None])
    return f"{tensor.dtype} {tuple(tensor.shape)} ".encode() + torch.cat(sums).cpu().numpy().tobytes()


@functools.cache
def _weights(device: str) -> Tensor:
    generator = torch.Generator().manual_seed(0x5EA1)
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return torch.randint(low, high, (_BLOCK,), generator=generator).to(device)
