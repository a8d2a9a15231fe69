"""Rows of files: JSON lines, JSON, CSV and parquet tables, as dicts of their fields."""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from pathlib import Path
from typing import Any

from clplat.errors import MissingError, UserError

ENDINGS = (".jsonl.gz", ".jsonl", ".json", ".csv", ".parquet")


def find_rows(folder: Path, part: str, bare: str | None = None) -> list[dict[str, Any]] | None:
    """Rows of the file of `folder` called `part` and one of `ENDINGS`; None where there is no such file.

    Args:
        bare: see `read_rows`.

    Raises:
        MissingError: a file that is not whole.
        UserError: there are several.
    """
    files = [file for ending in ENDINGS if (file := folder / f"{part}{ending}").is_file()]
    if len(files) > 1:
        raise UserError(f"stream.path: {folder} has {' and '.join(f.name for f in files)} (valid: one of them)")
    return read_rows(files[0], bare) if files else None


def read_rows(file: Path, bare: str | None = None) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, gzipped or not, a JSON file that holds a list, a CSV with a header, or a parquet file.

    A .json file that holds one JSON object a line is read as JSON lines, as many are published.

    Args:
        bare: the field that a row which is a text, and no object, is taken as; None: such a row is refused.

    Raises:
        MissingError: a line that is no JSON object or has not the header's columns, or a file cut short.
        UserError: a parquet file without the package pyarrow.
    """
    try:
        if file.suffix == ".parquet":
            return _parquet(file)
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = data.decode("utf-8-sig")
        if file.suffix == ".csv":
            return _csv(text)
        rows = _json(text, lines=file.suffix != ".json")
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise MissingError(f"{file} can't be read ({error}): replace it by a whole file") from error
    if bare is not None and isinstance(rows, list):
        rows = [{bare: row} if isinstance(row, str) else row for row in rows]
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise MissingError(f"{file} holds no list of JSON objects: replace it by one that does")
    return rows


def _json(text: str, lines: bool) -> Any:
    if not lines:
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            if error.msg != "Extra data":  # what a second line of JSON is
                raise
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def _csv(text: str) -> list[dict[str, Any]]:
    read = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = list(read)
    except csv.Error as error:
        raise ValueError(f"line {read.line_num}: {error}") from error
    names = read.fieldnames or []
    if len(set(names)) < len(names):
        raise ValueError(f"the header names a column twice: {', '.join(names)}")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise ValueError(f"row {number} has not the {len(names)} columns of the header")
    return rows


def _parquet(file: Path) -> list[dict[str, Any]]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"stream.path: {file.name} needs the package pyarrow: pip install pyarrow") from error
    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise ValueError(str(error).splitlines()[0]) from error
