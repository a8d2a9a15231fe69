"""The seal of a run's folder: digests of the files that reports are made of, so that damage is noticed and not shown.

`seal.json` is written when a run ends, whatever its status, and taken away when it is gone on with. A folder without
one (a killed run's) is read as it is. Checkpoints carry digests of their own. Imports no torch.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from clplat.files import to_json, write_atomic

FILE = "seal.json"
_FILES = ("config.yaml", "summary.json", "metrics.jsonl", "ledger.json", "requests.json")
_FOLDERS = ("audit", "predictions")
MADE_ANEW = frozenset(_FILES[1:4])  # by a run that is gone on with, from its checkpoint


def close_seal(run_dir: Path) -> None:
    """Write the seal of what is there now."""
    digests = {name: digest(run_dir / name) for name in _sealed(run_dir)}
    content = to_json(digests, indent=1, sort_keys=True)
    write_atomic(run_dir / FILE, to_json({"files": digests, "sha256": _text_digest(content)}, indent=1))


def break_seal(run_dir: Path) -> None:
    """Take the seal away, before anything that it covers is changed."""
    (run_dir / FILE).unlink(missing_ok=True)


def seal_faults(run_dir: Path, aside: frozenset[str] = frozenset()) -> list[str]:
    """One line for each sealed file that is damaged, changed by hand or gone; none where there is no seal.

    Args:
        aside: names not to look at.
    """
    file = run_dir / FILE
    if not file.exists():
        return []
    try:
        outer = json.loads(file.read_text(encoding="utf-8"))
        files: dict[str, str] = outer["files"]
        whole = outer["sha256"] == _text_digest(to_json(files, indent=1, sort_keys=True))
    except (OSError, ValueError, KeyError, TypeError, RecursionError, AttributeError):
        whole, files = False, {}
    if not whole:
        return [f"{file} is damaged: put it back, or remove it to have the folder read unchecked"]
    found = []
    for name, expected in files.items():
        path = run_dir / name
        if name in aside or ("/" in name and not (run_dir / name.partition("/")[0]).exists()):
            continue  # a folder of scores may be deleted as a whole: the reports say that it is not there
        if not path.is_file():
            found.append(f"{path} is missing: put it back")
        elif digest(path) != expected:
            found.append(f"{path} is damaged or was changed since the run ended: put it back")
    return found


def digest(path: Path, size: int | None = None) -> str:
    """SHA-256 of a file, or of its first `size` bytes."""
    found, left = hashlib.sha256(), size
    with open(path, "rb") as handle:
        while block := handle.read(1 << 20 if left is None else min(left, 1 << 20)):
            found.update(block)
            left = None if left is None else left - len(block)
    return found.hexdigest()


def _sealed(run_dir: Path) -> list[str]:
    inside = [p for folder in _FOLDERS for p in sorted((run_dir / folder).rglob("*")) if p.is_file()]
    return [n for n in _FILES if (run_dir / n).is_file()] + [p.relative_to(run_dir).as_posix() for p in inside]


def _text_digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
