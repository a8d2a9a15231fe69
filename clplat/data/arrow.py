"""Columns of Arrow files as the package `datasets` writes them, read a few rows at a time by where they stand.

Where rows stand is looked up in the mapped files; they themselves are read by offset, since a mapped file counts as
memory of the process as far as it has been read.

Shapes: N rows of a column.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from clplat.data.on_disk import ArrayFile, ArrayFiles, Member, Place
from clplat.errors import MissingError
from clplat.files import cache_folder, written

_ROWS = 1000  # of a piece of a file, as the package has them
_LISTS = ("ListArray", "LargeListArray", "FixedSizeListArray")
_WIDE = {"i": "i8", "u": "i8", "f": "f8"}  # what NumPy makes of Python's numbers


def pictures(files: Sequence[Path], column: str) -> list[Place] | str:
    """Where each picture of a column (bytes, path) stands, in order; or why that can't be told."""
    found: list[Place] = []
    for file, base, size, part in _parts(files, column):
        if sorted(part.type.field(i).name for i in range(part.type.num_fields)) != ["bytes", "path"]:
            return f"column {column!r} holds {part.type} instead of pictures"
        held, paths = part.field("bytes"), part.field("path")
        _, offsets, content = held.buffers()
        ends = np.frombuffer(offsets, np.int64 if str(held.type).startswith("large") else np.int32)
        ends = ends[held.offset : held.offset + len(held) + 1].astype(np.int64)
        first = 0 if content is None else content.address - base
        for row, there in enumerate(held.is_valid().to_numpy(False)):
            if there and not 0 <= first + ends[row] <= first + ends[row + 1] <= size:
                return f"{file} is compressed"
            if there:
                place = Member(file, int(first + ends[row]), int(ends[row + 1] - ends[row]), f"row {len(found)}")
                found.append(place)
            elif (path := paths[row].as_py()) is None:
                return f"row {len(found)} holds no picture"
            else:
                found.append(Path(path))
    return found


def numbers(files: Sequence[Path], column: str, key: str) -> ArrayFiles | str:
    """A column of numbers, or of lists of them of one length, as an array; or why there is none."""
    import pyarrow.compute as pc

    pieces, shapes, kinds = list[ArrayFile](), set[tuple[int, ...]](), set[str]()
    for file, base, size, part in _parts(files, column):
        rows, shape, leaf = len(part), list[int](), part
        while hasattr(leaf, "storage") or type(leaf).__name__ in _LISTS:
            if hasattr(leaf, "storage"):
                leaf = leaf.storage
                continue
            lengths = set(np.unique(pc.list_value_length(leaf).to_numpy(False)).tolist()) if len(leaf) else set()
            if leaf.null_count or len(lengths) != 1:
                return f"column {column!r} holds lists of several lengths"
            shape.append(int(*lengths))
            leaf = leaf.flatten()
        try:
            kind = np.dtype(leaf.type.to_pandas_dtype())
        except (NotImplementedError, TypeError):
            kind = np.dtype(object)
        if kind.kind not in _WIDE or kind == np.uint64 or leaf.null_count:
            return f"column {column!r} holds {leaf.type}{' and nothing' * bool(leaf.null_count)}"
        start = leaf.buffers()[-1].address - base + leaf.offset * kind.itemsize
        if not 0 <= start <= start + len(leaf) * kind.itemsize <= size:
            return f"{file} is compressed"
        pieces.append(ArrayFile(key, file, start, (rows, *(shape or [1])), kind))
        shapes.add(tuple(shape))
        kinds.add(_WIDE[kind.kind])
    if len(shapes) != 1 or len(kinds) != 1:
        return f"column {column!r} holds lists of several lengths"
    return ArrayFiles(key, tuple(pieces), np.dtype(kinds.pop()))


def _parts(files: Sequence[Path], column: str) -> Iterator[tuple[Path, int, int, Any]]:
    """File, address of its first byte, its size and a piece of the column, piece by piece, of each that has rows."""
    import pyarrow as pa

    for file in files:
        try:
            with pa.memory_map(str(file)) as mapped:
                base, size = mapped.read_buffer(1).address, mapped.size()
                mapped.seek(0)
                for batch in pa.ipc.open_stream(mapped):
                    if len(batch):
                        yield file, base, size, batch.column(column)
        except (OSError, pa.ArrowException) as error:
            raise MissingError(f"stream.dataset: {file} can't be read ({error}): replace it by a whole file") from error


def kept(part: Any, columns: Sequence[str], told: str) -> Any:
    """Columns of a part in its streaming form as a data set in an Arrow file of the cache, written there once.

    Args:
        told: what names the part and its content.

    Raises:
        MissingError: it can't be read, or not be written.
    """
    import datasets
    import pyarrow as pa

    name = hashlib.sha256(json.dumps([told, *columns]).encode()).hexdigest()[:32]
    file = cache_folder() / f"streamed-{name}.arrow"
    if not file.is_file():
        tables = part.select_columns([*columns]).with_format("arrow").iter(batch_size=_ROWS)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            first = next(tables)
            with written(file) as handle, pa.ipc.new_stream(handle, first.schema) as out:
                for table in chain([first], tables):  # pictures come with their bytes, whatever names them there
                    out.write_table(datasets.table.embed_table_storage(table))
        except StopIteration:
            raise MissingError(f"stream.dataset: {told} has no rows (valid: a split that has some)") from None
        except (OSError, RuntimeError, pa.ArrowException) as error:
            raise MissingError(f"stream.streaming: {told} could not be put into {file} ({error})") from error
    return datasets.Dataset.from_file(str(file))
