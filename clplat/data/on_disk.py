"""Data that stay on disk: whether they do, what was found out about them once, and arrays read a few rows at a time.

Files are read by offset, not mapped: what is read does not count as memory of the process, and a file that was cut
short is an error that names it instead of a signal.

Shapes: N rows of a file, B of a batch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from clplat.errors import MissingError, UserError
from clplat.files import cache_folder, write_atomic
from clplat.package import __version__

SHARE = 4  # data are held in memory by default where they take at most 1/4 of what is free
_CHUNK = 2**24  # bytes looked at in one go
_CGROUP = Path("/sys/fs/cgroup")
_SAFETENSORS = {"BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4",
                "U64": "<u8", "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8"}  # fmt: skip


def free_memory() -> int:
    """Bytes that this process may still take: of the machine, and of its control group where that has a limit."""
    import psutil

    free = int(psutil.virtual_memory().available)
    with suppress(OSError, ValueError):  # "max": none
        limit = int((_CGROUP / "memory.max").read_text())
        free = min(free, limit - int((_CGROUP / "memory.current").read_text()))
    return max(free, 0)


def stays(in_memory: bool | None, size: int, what: str, notes: list[str]) -> bool:
    """Whether data of `size` bytes stay on disk: as asked, or by what is free; `notes` gets a line where they do.

    Args:
        in_memory: as `stream.in_memory`.
        what: they are, in words.
    """
    free = free_memory()
    if in_memory or (in_memory is None and size <= free // SHARE):
        return False
    why = "as asked" if in_memory is False else f"above a quarter of the {free / 1e9:.1f} GB that are free"
    notes.append(f"stream.in_memory: false, {why}: {what} take {size / 1e9:.2f} GB, and are read as they are needed")
    return True


@dataclass(frozen=True)
class Member:
    """A file within a tar file.

    Args:
        offset: of its first byte.
        size: in bytes.
        name: within the tar file.
    """

    tar: Path
    offset: int
    size: int
    name: str

    def __str__(self) -> str:
        return f"{self.tar}/{self.name}"

    def content(self) -> bytes:
        """All of it; less where the tar file was cut short. Raises OSError."""
        with open(self.tar, "rb", buffering=0) as file:
            file.seek(self.offset)
            return file.read(self.size)


Place = Path | Member


def remembered(what: str, files: Iterable[Place], options: Sequence[Any], find: Callable[[], Any]) -> Any:
    """What `find` gives, plain values, or gave when it was last asked of the same files as they are now.

    It is kept in the cache folder under names, sizes and times of the files; without one, it is found each time.

    Args:
        what: is found, a name.
        options: what it depends on beside the files, plain values.
    """
    digest = hashlib.sha256(json.dumps([what, __version__, *options]).encode())
    for file in files:
        path, offset = (file.tar, file.offset) if isinstance(file, Member) else (file, 0)
        with suppress(OSError):
            state = os.stat(path)
            told = f"{os.path.abspath(path)}\0{offset}\0{state.st_size}\0{state.st_mtime_ns}\n"
            digest.update(os.fsencode(told))
    place = cache_folder() / f"{what}-{digest.hexdigest()[:32]}.json"
    with suppress(OSError, ValueError):
        return json.loads(place.read_text())
    found = find()
    with suppress(OSError):
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, json.dumps(found))
    return found


@dataclass(frozen=True)
class ArrayFile:
    """An array (N, ...) in a file, one row after the other.

    Args:
        key: its name, for messages.
        offset: of its first byte.
        shape: (N, ...).
        stored: type of its numbers, in the file's byte order.
    """

    key: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    stored: np.dtype

    def __post_init__(self) -> None:
        if self.stored.kind not in "biuf":
            raise UserError(f"stream: {self.key} holds {self.stored} (valid: numbers)")
        size = self.path.stat().st_size
        if size < (whole := self.offset + math.prod(self.shape) * self.stored.itemsize):
            raise MissingError(f"{self.path} can't be read ({size} bytes, not {whole}): replace it by a whole file")

    @property
    def dtype(self) -> np.dtype:
        """In the machine's byte order."""
        return self.stored.newbyteorder("=")

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def rows(self, rows: Sequence[int]) -> np.ndarray:
        """(B, ...) in the machine's byte order."""
        size = math.prod(self.shape[1:]) * self.stored.itemsize
        found = np.empty((len(rows), *self.shape[1:]), self.stored)
        left = found.reshape(-1).view(np.uint8).data
        try:
            with open(self.path, "rb", buffering=0) as file:
                for first, count in _runs(rows):
                    file.seek(self.offset + first * size)
                    end = len(left) - count * size
                    while len(left) > end:
                        if not (read := file.readinto(left[: len(left) - end])):
                            raise OSError(f"it ends at row {first} or after")
                        left = left[read:]
        except OSError as error:
            raise MissingError(f"{self.path} can't be read ({error}): replace it by a whole file") from error
        return found.astype(self.dtype, copy=False)

    def ends(self) -> tuple[Any, Any]:
        """Smallest and largest number, of floats as 32-bit ones; looked for once.

        Raises:
            UserError: one is NaN or infinite; names its row.
        """
        told = [self.key, self.offset, self.shape, self.stored.str]
        return tuple(remembered("ends", [self.path], told, lambda: _ends(self)))


@dataclass(frozen=True, eq=False)
class ArrayFiles:
    """An array (N, ...) in several pieces, the rows of one after those of another.

    Args:
        key: its name, for messages.
        pieces: of one shape but for their lengths, at least one.
        dtype: that rows come in.
        chosen: (N,) int64 rows of all pieces that make up the array; None: all, in order.
    """

    key: str
    pieces: tuple[ArrayFile, ...]
    dtype: np.dtype
    chosen: np.ndarray | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, ...)."""
        count = sum(p.shape[0] for p in self.pieces) if self.chosen is None else len(self.chosen)
        return (count, *self.pieces[0].shape[1:])

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return len(self.shape)

    def rows(self, rows: Sequence[int]) -> np.ndarray:
        """(B, ...)."""
        at = np.asarray(rows, np.int64) if self.chosen is None else self.chosen[np.asarray(rows, np.int64)]
        stops = np.cumsum([p.shape[0] for p in self.pieces])
        owner, found = np.searchsorted(stops, at, side="right"), np.empty((len(at), *self.shape[1:]), self.dtype)
        for number in np.unique(owner).tolist():
            piece, mine = self.pieces[number], owner == number
            found[mine] = piece.rows((at[mine] - stops[number] + piece.shape[0]).tolist())
        return found

    def ends(self) -> tuple[Any, Any]:
        """As of an `ArrayFile`."""
        chosen = None if self.chosen is None else hashlib.sha256(self.chosen.tobytes()).hexdigest()
        told = [self.key, [[p.offset, p.shape, p.stored.str] for p in self.pieces], self.dtype.str, chosen]
        return tuple(remembered("ends", [p.path for p in self.pieces], told, lambda: _ends(self)))


def _ends(array: ArrayFile | ArrayFiles) -> list[Any]:
    each = max(_CHUNK // max(math.prod(array.shape[1:]) * array.dtype.itemsize, 1), 1)
    ends: list[Any] = []
    for first in range(0, array.shape[0], each):
        part = array.rows(range(first, min(first + each, array.shape[0])))
        if array.dtype.kind == "f":
            with np.errstate(over="ignore"):
                part = part.astype(np.float32)
            if not (fine := np.isfinite(part).reshape(len(part), -1).all(1)).all():
                row = int(fine.argmin())
                worst = next(float(x) for x in part[row].flat if not math.isfinite(x))
                what = f"{array.key} hold {worst} in row {first + row}"
                raise UserError(f"stream: {what} (valid: finite 32-bit numbers)")
        ends = [min([*ends[:1], part.min().item()]), max([*ends[1:], part.max().item()])]
    return ends or [0, 0]


def _runs(rows: Sequence[int]) -> Iterator[tuple[int, int]]:
    """First row and length of each run of rows that follow each other."""
    first, count = 0, 0
    for row in rows:
        if count and row == first + count:
            count += 1
            continue
        if count:
            yield first, count
        first, count = row, 1
    if count:
        yield first, count


def npy_file(key: str, path: Path, whole: bool = False) -> ArrayFile | np.ndarray:
    """The array of an .npy file, left there, or read if it is wanted `whole`.

    Raises:
        MissingError: it is not there, or not whole.
        UserError: it is stored column after column, and not wanted whole.
    """
    try:
        found = np.load(path, mmap_mode=None if whole else "r", allow_pickle=False)  # mapped, only its head is read
    except FileNotFoundError:
        raise MissingError(f"stream.path: {path} is missing: put it there, or name another path") from None
    except (OSError, ValueError, EOFError) as error:
        raise MissingError(f"stream.path: {path} can't be read ({error}): replace it by a whole .npy file") from error
    if whole:
        return found
    if not found.flags.c_contiguous:
        raise UserError(f"stream.path: {path} is stored in Fortran order (valid: C order, or stream.in_memory true)")
    return ArrayFile(key, path, found.offset, found.shape, found.dtype)


def safetensors_files(path: Path) -> dict[str, ArrayFile]:
    """The arrays of a .safetensors file.

    Raises:
        MissingError: it is not there, or not whole.
        UserError: numbers that NumPy has no type for.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np"), open(path, "rb") as file:  # the first checks the head
            size = int.from_bytes(file.read(8), "little")
            head = json.loads(file.read(size))
    except FileNotFoundError:
        raise MissingError(f"stream.path: {path} is missing: put it there, or name another path") from None
    except (OSError, SafetensorError, ValueError) as error:
        raise MissingError(f"stream.path: {path} can't be read ({error}): replace it by a whole file") from error
    found = {}
    for key, of in head.items():
        if key == "__metadata__":
            continue
        if of["dtype"] not in _SAFETENSORS:
            raise UserError(f"stream: {key} holds {of['dtype']} (valid on disk: {', '.join(_SAFETENSORS)})")
        found[key] = ArrayFile(key, path, 8 + size + of["data_offsets"][0], tuple(of["shape"]),
                               np.dtype(_SAFETENSORS[of["dtype"]]))  # fmt: skip
    return found
