"""Pictures and their classes in tar files, as WebDataset writes them. Nothing is unpacked: members are read by offset.

    <name>.tar      members <key>.jpg (or another picture) and <key>.cls, its class as text; others are not used

Format: Aizman, Maltby, Breuel, High Performance I/O For Large Scale Deep Learning, IEEE Big Data 2019 (WebDataset).
"""

from __future__ import annotations

import tarfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from clplat.data.on_disk import Member, remembered
from clplat.errors import MissingError, UserError

_LONGEST = 256  # bytes of a class


def labelled_members(tars: Sequence[Path], known: Sequence[str]) -> tuple[list[Member], list[str], list[str]]:
    """The pictures of tar files, in their order; the class of each; and the endings of members that are not used.

    The index of a file is made once, and kept in the cache folder.

    Args:
        known: endings of pictures, each with its dot.

    Raises:
        UserError: a compressed file; a sample without a class, or with several pictures.
        MissingError: a file that is not there, or can't be read.
    """
    found: list[Member] = []
    labels, idle = list[str](), set[str]()
    for path in tars:
        rows, others = remembered("tar", [path], sorted(known), partial(_index, path, frozenset(known)))
        found += [Member(path, offset, size, name) for name, offset, size, _ in rows]
        labels += [label for *_, label in rows]
        idle |= set(others)
    return found, labels, sorted(idle)


def _index(path: Path, known: frozenset[str]) -> tuple[list[list[Any]], list[str]]:
    """Name, offset, size and class of each picture; endings of the other members."""
    pictures: dict[str, list[Any]] = {}
    labels, others = dict[str, str](), set[str]()
    try:
        with tarfile.open(path, "r:") as archive:
            for member in archive:
                folder, slash, file = member.name.rpartition("/")
                stem, dot, ending = file.partition(".")
                key, ending = folder + slash + stem, (dot + ending).lower()
                if not member.isreg() or not stem:
                    continue
                if ending in known and key in pictures:
                    raise UserError(f"stream.path: {path} has two pictures of {key!r} (valid: one a sample)")
                if ending in known:
                    pictures[key] = [member.name, member.offset_data, member.size]
                elif ending == ".cls":
                    content = archive.extractfile(member)
                    assert content is not None
                    labels[key] = content.read(_LONGEST).decode().strip()
                else:
                    others.add(ending)
    except FileNotFoundError:
        raise MissingError(f"stream.path: {path} is missing: put it there, or name another path") from None
    except (OSError, tarfile.TarError, UnicodeDecodeError) as error:
        what = f"stream.path: {path} can't be read ({error})"
        raise MissingError(f"{what}: replace it by a whole .tar file that is not compressed") from error
    if bare := next((key for key in pictures if not labels.get(key)), None):
        raise UserError(f"stream.path: {bare!r} of {path} has no class (valid: a member {bare}.cls that holds it)")
    return [[*picture, labels[key]] for key, picture in pictures.items()], sorted(others)
