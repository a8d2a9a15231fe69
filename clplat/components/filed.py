"""Rows of a memory in a file, where they stand in the place of a tensor: read and written by slot, a few at a time.

A row that a checkpoint may need is never written over: what comes into its slot goes to another place in the file, and
which place a slot has is in the checkpoint, in the place of the row. A place is emptied, and used again, once no
checkpoint that is kept knows it. So the file holds what the memory or a kept checkpoint does and nothing else, and a
run that is killed finds in it what its last checkpoint had, whatever was written since. Each row has a sum, which is in
the checkpoint, too: a place that does not hold what it should is refused.

The file is read by offset, not mapped: what is read does not count as memory of the process.

Shapes: S slots, n samples.
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplat.errors import MissingError

_EMPTY = -1


class Filed:
    """Rows (S, ...), zeros at first, with what memories ask of a tensor of them.

    Args:
        file: that holds the rows; None: nobody has said where it is, and rows can't be read.
        like: (0, ...) of their shape and type.
        size: S.
    """

    def __init__(self, file: Path | None, like: Tensor, size: int) -> None:
        self.file, self.like = file, like[:0].cpu()
        self.shape, self.dtype, self.device = torch.Size((size, *like.shape[1:])), like.dtype, torch.device("cpu")
        self.at = torch.full((size,), _EMPTY)  # place of each slot's row in the file
        self.sums = torch.zeros(size, dtype=torch.int64)
        self.places = 0  # that the file has
        self._born = torch.full((size,), _EMPTY)  # how many checkpoints there were before a slot's row was written
        self._checkpoints = 0
        self._empty: list[int] = []  # places that nothing needs
        self._left: deque[tuple[int, int]] = deque()  # places that checkpoints need: how many these were, and which
        self._handle: int | None = None
        self._flags = os.O_RDWR | os.O_CREAT | os.O_TRUNC  # what is there is of a run that begins anew

    @property
    def row_bytes(self) -> int:
        """Of a row."""
        return self.shape[1:].numel() * self.like.element_size()

    @property
    def nbytes(self) -> int:
        """Of all slots, as a tensor would take."""
        return len(self.at) * self.row_bytes

    def __getitem__(self, slots: Tensor) -> Tensor:
        """Rows (n, ...) of `slots` (n,) int64, on their device.

        Raises:
            MissingError: the file is not there, or not as it was left.
        """
        found = torch.zeros((len(slots), *self.shape[1:]), dtype=self.dtype)
        raw, size, wanted = _raw(found), self.row_bytes, slots.cpu()
        for number, (place, known) in enumerate(zip(self.at[wanted].tolist(), self.sums[wanted].tolist(), strict=True)):
            if place == _EMPTY:
                continue
            part = raw[number * size : (number + 1) * size]
            if os.preadv(self._open(), [part], place * size) < size or zlib.crc32(part) != known:
                raise MissingError(f"{self.file} is damaged in place {place}: put back the file of this run's memory")
        return found.to(slots.device)

    def index_select(self, dim: int, slots: Tensor) -> Tensor:
        """The same; `dim` is 0."""
        assert dim == 0
        return self[slots]

    def index_copy_(self, dim: int, slots: Tensor, rows: Tensor) -> Filed:
        """Put rows (n, ...) into `slots` (n,), no two alike; `dim` is 0."""
        assert dim == 0
        if rows.dtype != self.dtype or rows.shape[1:] != self.shape[1:]:
            own, given = ((tuple(t.shape[1:]), t.dtype) for t in (self, rows))
            raise ValueError(f"this memory holds inputs {own}, got {given}")
        if self._flags == os.O_RDONLY:
            raise ValueError("the memory of a loaded learner is only read")
        raw, size, handle = _raw(rows.detach().cpu().contiguous()), self.row_bytes, self._open()
        for number, slot in enumerate(slots.tolist()):
            place, part = int(self.at[slot]), raw[number * size : (number + 1) * size]
            if place == _EMPTY or int(self._born[slot]) < self._checkpoints:  # a checkpoint may need what is there
                if place != _EMPTY:
                    self._left.append((self._checkpoints, place))
                place = self._empty.pop() if self._empty else self.places
                self.places = max(self.places, place + 1)
            _write(handle, part, place * size)
            self.at[slot], self.sums[slot], self._born[slot] = place, zlib.crc32(part), self._checkpoints
        return self

    def move(self, source: Tensor, to: Tensor) -> None:
        """Have the rows in slots `source` (n,) in slots `to` (n,), and nothing in all others."""
        kept = self.at[source]
        for slot in torch.where(~torch.isin(self.at, kept) & (self.at != _EMPTY))[0].tolist():
            if int(self._born[slot]) < self._checkpoints:
                self._left.append((self._checkpoints, int(self.at[slot])))
            else:
                self._clear(int(self.at[slot]))
        for name, nothing in (("at", _EMPTY), ("sums", 0), ("_born", _EMPTY)):
            old = getattr(self, name)
            new = torch.full_like(old, nothing)
            new[to] = old[source]
            setattr(self, name, new)

    def checkpointed(self, kept: int) -> None:
        """Tell that a checkpoint of what is held now is about to be written, and that all earlier ones are whole."""
        self.let_go(kept)
        self._checkpoints += 1
        if self._handle is not None:
            os.fdatasync(self._handle)

    def let_go(self, kept: int) -> None:
        """Empty the places that none of the `kept` last checkpoints knows; those taken so far are whole."""
        while self._left and self._left[0][0] + kept <= self._checkpoints:
            self._clear(self._left.popleft()[1])

    def _clear(self, place: int) -> None:
        _write(self._open(), memoryview(bytes(self.row_bytes)), place * self.row_bytes)
        self._empty.append(place)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return {"at": self.at, "sums": self.sums, "places": torch.tensor(self.places), "like": self.like}

    @classmethod
    def restored(cls, file: Path | None, state: dict[str, Tensor], *, go_on: bool) -> Filed:
        """As it was when `state` was taken.

        Args:
            go_on: whether rows will be written; what the file got since is taken out of it then.

        Raises:
            MissingError: the file is not there, or lacks rows.
        """
        found = cls(file, state["like"], len(state["at"]))
        found.at, found.sums = state["at"].cpu().clone(), state["sums"].cpu().clone()
        found.places = int(state["places"])
        if not go_on:
            found._flags = os.O_RDONLY
        elif file is not None:
            found._flags, needed = os.O_RDWR | os.O_CREAT, (int(found.at.max()) + 1) * found.row_bytes
            size = file.stat().st_size if (there := file.is_file()) else 0
            if size < needed:
                has = f"has {size} bytes, not {needed}" if there else "is missing"
                raise MissingError(f"{file} {has}: put back the file of this run's memory")
            if there:
                os.truncate(file, min(size, found.places * found.row_bytes))
            held = set(found.at.tolist())
            found._left.extend((0, place) for place in range(found.places) if place not in held)
        return found

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """In memory: two that write to one file would spoil each other's rows."""
        return self[torch.arange(len(self.at))]

    def _open(self) -> int:
        if self._handle is None:
            if self.file is None:
                raise MissingError("the samples of this memory are in a file of its run's folder (valid: load that)")
            try:
                self._handle = os.open(self.file, self._flags, 0o666)
            except FileNotFoundError:
                raise MissingError(f"{self.file} is missing: put back the file of this run's memory") from None
        return self._handle

    def __del__(self) -> None:
        if getattr(self, "_handle", None) is not None:
            os.close(self._handle)  # type: ignore[arg-type]
            self._handle = None


def content(state: Mapping[str, Any]) -> dict[str, Any]:
    """A learner's state without where rows stand in files, which follows from when checkpoints were written."""
    return {k: v for k, v in state.items() if not ("filed." in k and k.endswith((".at", ".places")))}


def _raw(rows: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    content: Any = rows.reshape(-1).view(torch.uint8).numpy() if rows.numel() else bytearray()
    return memoryview(content)


def _write(handle: int, part: memoryview, offset: int) -> None:
    while part:
        done = os.pwrite(handle, part, offset)
        part, offset = part[done:], offset + done
