"""Files that are whole or absent: written beside the target, flushed to disk, then renamed over it."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


def write_atomic(path: Path, content: bytes | str | Iterable[bytes | memoryview]) -> None:
    """Write `content` to `path` so that a crash leaves the old file or the new one, never a part.

    Args:
        content: whole, or piece by piece.

    Raises:
        OSError: as the system gives it (a full disk, say); the old file is untouched.
    """
    text = content.encode() if isinstance(content, str) else content
    with written(path) as handle:
        handle.writelines([text] if isinstance(text, bytes) else text)


@contextmanager
def written(path: Path) -> Iterator[IO[bytes]]:
    """What is written to the handle is the file `path` once the block ends well, and nowhere before. Raises OSError."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries, so that a rename in it survives a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def cache_folder() -> Path:
    """$CLPLAT_CACHE, or clplat/ in $XDG_CACHE_HOME or ~/.cache."""
    own = os.environ.get("CLPLAT_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "clplat"


def put_parts(page: Path, parts: Mapping[str, str]) -> None:
    """Replace what stands between `<!-- generated: NAME -->` and `<!-- end: NAME -->` in a page of Markdown.

    Raises:
        ValueError: the page has no such part, or several.
    """
    text = page.read_text(encoding="utf-8")
    for name, part in parts.items():
        pattern = rf"(<!-- generated: {name} -->\n).*?(<!-- end: {name} -->)"
        text, count = re.subn(pattern, lambda m, part=part: f"{m[1]}\n{part}\n\n{m[2]}", text, flags=re.DOTALL)  # type: ignore[misc]
        if count != 1:
            raise ValueError(f"{page} has {count} parts {name}, not one")
    write_atomic(page, text)


def to_json(value: Any, **options: Any) -> str:
    """JSON in which a NaN or infinity, which JSON lacks, is null."""
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # there is one
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
