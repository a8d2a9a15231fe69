"""Labelled pictures in files of their own: `<part>/<class>/<file>`, or a listing of paths and labels.

    <root>/train/<class>/*.jpg, <root>/test/<class>/*.jpg      or <root>/<class>/*.jpg alone
    <root>/train/*.tar, <root>/test/*.tar                      or <root>/*.tar alone (see `clplat.data.tars`)
    listing.csv or .parquet        path (relative to the listing), label, and maybe split (train or test) and domain

Shapes: N pictures of a part.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clplat.data.datasets import ImageSet, stratified_split
from clplat.data.decoded import decoded
from clplat.data.on_disk import Place, stays
from clplat.data.pictures import middle, read_head, read_picture, stacked
from clplat.data.tars import labelled_members
from clplat.errors import MissingError, UserError

COLUMNS = ("path", "label", "split", "domain")


@dataclass
class Listed:
    """One part before its pictures are read: a path, a label and maybe a domain each."""

    paths: list[Place] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)
    domains: list[str] = field(default_factory=list)

    def part(self, rows: Sequence[int]) -> Listed:
        """Those at `rows`, in that order."""
        return Listed(*([column[r] for r in rows] if column else [] for column in vars(self).values()))


@dataclass(frozen=True, eq=False)
class Pictures:
    """Both parts, read or to be read, what their labels and domains are called, and lines that say what was decided."""

    train: ImageSet
    test: ImageSet
    classes: list[str]
    domains: list[str]
    notes: list[str]


def read_pictures(
    path: Path, *, size: int | None, grey: bool, test_share: float, scale: float | None = None,
    in_memory: bool | None = None, workers: int | None = None,
) -> Pictures:  # fmt: skip
    """The pictures of a folder or a listing.

    Args:
        size: side in pixels; the shorter side is scaled to it and the middle cut out. None: all must be of one size.
        grey: one channel instead of three.
        test_share: in (0, 1), of each class's pictures, held out where there is no test part.
        scale: as in `stacked`.
        in_memory: whether all are read now; None: if they take at most a quarter of the free memory.
        workers: threads that read those that are not, ≥ 1; None: `default_workers`.

    Raises:
        UserError: an unclear layout, a picture that can be read in several ways, pictures of several sizes.
        MissingError: no such folder, listing or picture, or one that can't be read.
    """
    notes = list[str]()
    parts = _listing(path, notes) if path.suffix in (".csv", ".parquet") else _folder(path, notes)
    classes = _ordered({label for part in parts.values() for label in part.labels})
    domains = _ordered({domain for part in parts.values() for domain in part.domains})
    found = list(parts.values())
    if len(found) == 1:
        found = _split(found[0], classes, test_share)
        what = f"{path} has no test part: {len(found[1].labels)} of {len(parts['train'].paths)} pictures"
        notes.append(f"stream.test_share: {what} are held out, always the same ones")
    count, first = sum(len(part.paths) for part in found), found[0].paths[0]
    height, width = (size, size) if size is not None else read_head(first)[:2]
    images: Sequence[Any]
    if stays(in_memory, count * (1 if grey else 3) * height * width, f"the {count} pictures of {path}", notes):
        images = decoded([p.paths for p in found], size=size, grey=grey, scale=scale, workers=workers)
    else:
        fit = None if size is None else middle(size)
        images = stacked(*[[read_picture(p, grey=grey, fit=fit) for p in part.paths] for part in found], scale=scale)
    sets = [
        ImageSet(held, _numbers(part.labels, classes), _domains(part, domains))
        for held, part in zip(images, found, strict=True)
    ]
    return Pictures(sets[0], sets[1], classes, domains, notes)


def _folder(root: Path, notes: list[str]) -> dict[str, Listed]:
    """Parts of a folder; what is not used is said."""
    if not root.is_dir():
        raise MissingError(f"stream.path: no folder {root}: put train/<class>/*.jpg and test/<class>/*.jpg there")
    found = [p.name for p in _inside(root)]
    if "train" not in found:
        return {"train": _classes(root, notes)}
    test = next((name for name in ("test", "val", "valid", "validation") if name in found), None)
    if test not in (None, "test"):
        notes.append(f"stream.path: {root / str(test)} is the test part, since there is no test/")
    idle = sorted(set(found) - {"train", test})
    if idle:
        notes.append(f"stream.path: {', '.join(idle)} in {root} are not used (known: train, test)")
    return {"train": _classes(root / "train", notes), **({"test": _classes(root / test, notes)} if test else {})}


def _classes(folder: Path, notes: list[str]) -> Listed:
    """All pictures of a folder of classes, or of tar files."""
    from PIL import Image

    known, found = Image.registered_extensions(), Listed()
    if (inside := _inside(folder)) and all(p.suffix == ".tar" for p in inside):
        members, labels, idle = labelled_members(inside, tuple(known))
        if idle:
            notes.append(f"stream.path: members {', '.join(idle)} of the tar files in {folder} are not used")
        found = Listed([*members], labels)
        inside = []
    for place in inside:
        files = _inside(place) if place.is_dir() else []
        odd = next((p for p in files or [place] if p.is_dir() or p.suffix.lower() not in known), None)
        if odd is not None:
            raise UserError(f"stream.path: {odd} is no picture (valid: <class>/<picture> in {folder}, and no more)")
        found.paths += files
        found.labels += [place.name] * len(files)
    if not found.paths:
        raise MissingError(f"stream.path: no pictures in {folder}: put <class>/*.jpg there")
    return found


def _inside(folder: Path) -> list[Path]:
    """What is in a folder, in order, but for hidden files."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def _listing(file: Path, notes: list[str]) -> dict[str, Listed]:
    """Parts of a listing; each row is used, or refused by its number, the first one after the names being 1."""
    rows = _rows(file)
    columns = list(rows[0]) if rows else []
    absent = [name for name in COLUMNS[:2] if name not in columns]
    if absent:
        raise UserError(f"stream.path: {file} has no column {absent[0]!r} (it has: {', '.join(columns) or 'no rows'})")
    if idle := [name for name in columns if name not in COLUMNS]:
        notes.append(f"stream.path: columns {', '.join(map(str, idle))} of {file} are not used")
    parts: dict[str, Listed] = {}
    for number, row in enumerate(rows, 1):
        empty = next((name for name in COLUMNS if name in columns and row[name] in (None, "")), None)
        split = row.get("split", "train")
        if empty is not None or split not in ("train", "test"):
            what = f"has no {empty}" if empty else f"has split {split!r}"
            raise UserError(f"stream.path: row {number} of {file} {what} (valid: path, label, split train or test)")
        part = parts.setdefault(str(split), Listed())
        part.paths.append(file.parent / str(row["path"]))
        part.labels.append(str(row["label"]))
        part.domains += [str(row["domain"])] if "domain" in columns else []
    if "train" not in parts:
        raise UserError(f"stream.path: {file} has no row of split train")
    return {name: parts[name] for name in ("train", "test") if name in parts}


def _rows(file: Path) -> list[dict[str, object]]:
    try:
        if file.suffix == ".parquet":
            import pyarrow.parquet

            return pyarrow.parquet.read_table(file).to_pylist()
        with open(file, newline="", encoding="utf-8-sig") as lines:
            return [dict(row) for row in csv.DictReader(lines, strict=True)]
    except FileNotFoundError:
        raise MissingError(f"stream.path: {file} is missing: put the listing there, or name another path") from None
    except ImportError:
        raise UserError("stream.path: a .parquet listing needs the package pyarrow (valid: .csv)") from None
    except (OSError, ValueError, csv.Error) as error:  # pyarrow's errors are among them
        raise MissingError(f"stream.path: {file} can't be read ({error}): replace it by a whole file") from error


def _ordered(names: set[str]) -> list[str]:
    """Sorted, as numbers where all are."""
    return sorted(names, key=int) if all(n.isdecimal() for n in names) else sorted(names)


def _numbers(names: Sequence[str], known: Sequence[str]) -> Tensor:
    number = {name: i for i, name in enumerate(known)}
    return torch.tensor([number[name] for name in names], dtype=torch.int64)


def _domains(part: Listed, known: Sequence[str]) -> dict[str, Tensor]:
    return {"domain": _numbers(part.domains, known)} if part.domains else {}


def _split(whole: Listed, classes: Sequence[str], share: float) -> list[Listed]:
    labels = _numbers(whole.labels, classes).numpy()
    counts = np.bincount(labels, minlength=len(classes))
    if counts.min() < 2:
        what = f"class {classes[int(counts.argmin())]} has one picture"
        raise UserError(f"stream.test_share: {what}, none of which can be held out (valid: a test part)")
    return [whole.part(rows.tolist()) for rows in stratified_split(labels, test_share=share, random_state=0)]
