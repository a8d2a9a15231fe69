"""A run's folder: `<output>/<name>/<timestamp>-<seed>/`."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from pathlib import Path

from clplat.config.given import keys_of
from clplat.config.settings import Config
from clplat.errors import UserError
from clplat.files import to_json, write_atomic


def make_run_dir(config: Config, run_dir: Path | None = None) -> Path:
    """A folder for a new run (`run_dir`, or one of its own) that holds its config.yaml.

    Raises:
        UserError: it can't be written.
    """
    try:
        if run_dir is None:
            run_dir = _new_run_dir(Path(config.output) / str(config.name), config.seed)
        run_dir.mkdir(parents=True, exist_ok=True)
        write_config(run_dir / "config.yaml", config)
    except OSError as error:
        raise UserError(f"output: can't write in {config.output}: {error.strerror}") from error
    return run_dir


def newest(config: Config) -> Path | None:
    """Folder of the newest run of this name and seed; None where there is none."""
    name = re.compile(rf"(\d{{8}}-\d{{6}})-{config.seed}(?:\.(\d+))?")
    folders = [f.parent for f in (Path(config.output) / str(config.name)).glob("*/config.yaml")]
    found = [(m[1], int(m[2] or 1), f) for f in folders if (m := name.fullmatch(f.name))]
    return max(found)[2] if found else None


def runs_in(folders: Iterable[str | Path], command: str = "report", *, ended: bool = True) -> list[Path]:
    """Folders of runs: each given one, if it is a run's; else all that are in it, as in an experiment's or a study's.

    Args:
        command: that faults are told for.
        ended: only those with a summary.json; else also those that have none yet, or were killed before.

    Raises:
        UserError: there are none in one of them.
    """
    files = ("summary.json",) if ended else ("summary.json", "metrics.jsonl")

    def inside(folder: Path) -> list[Path]:
        own = [folder] if any((folder / file).is_file() for file in files) else []
        return own or sorted({f.parent for file in files for f in folder.rglob(file)})

    found = {folder: inside(folder) for folder in map(Path, folders)}
    what = "is no folder of a run or of runs (there is no summary.json in it)"
    if missing := [f"{command}: {folder} {what}" for folder, runs in found.items() if not runs]:
        raise UserError(*missing)
    return list(dict.fromkeys(run for runs in found.values() for run in runs))


def write_config(path: Path, config: Config) -> None:
    """config.yaml, from which the same run can be run again."""
    import yaml

    text = yaml.safe_dump(json.loads(to_json(config.to_dict())), sort_keys=False, allow_unicode=True)
    if given := keys_of(config):
        text = f"# {', '.join(given)}: given in Python, so this file alone can't repeat the run (docs/api.md).\n{text}"
    write_atomic(path, text)


def _new_run_dir(parent: Path, seed: int) -> Path:
    """A folder of our own: <timestamp>-<seed>, with a further number if another run was as quick."""
    stamp, number = time.strftime("%Y%m%d-%H%M%S"), 1
    while True:
        path = parent / (f"{stamp}-{seed}" if number == 1 else f"{stamp}-{seed}.{number}")
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            number += 1
        else:
            return path
