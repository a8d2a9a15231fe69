"""A former run of the same configuration and code, to be used again or gone on with instead of a new one."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from clplat.config.resolve import resolve
from clplat.config.settings import Config
from clplat.errors import UserError
from clplat.files import to_json
from clplat.package import __version__
from clplat.run.seal import FILE, seal_faults
from clplat.run.summary import git_commit

_ROOTS = ("strategies", "streams")


@dataclass(frozen=True)
class Former:
    """A run that was begun with the same configuration.

    Args:
        status: complete (its figures stand), partial (it has a checkpoint to go on from), or unusable.
        reason: why it is unusable.
    """

    run_dir: Path
    status: str
    reason: str = ""


def former(config: Config) -> Former | None:
    """The newest run of this configuration in its folder that can be used, or else one that can't; None without any.

    Complete ones come first. Used are only runs of this code: of the same version and commit, with no source file
    written since they began.
    """
    found = [_judged(folder) for folder in _same(config)]
    for status in ("complete", "partial", "unusable"):
        if chosen := [f for f in found if f.status == status]:
            return chosen[-1]
    return None


def _same(config: Config) -> Iterator[Path]:
    """Folders of runs of the same configuration, oldest first; where measurements were sent makes no difference."""
    wanted = _compared(config)
    for file in sorted(Path(config.output, str(config.name)).glob(f"*-{config.seed}*/config.yaml")):
        try:
            own = resolve(config=file)
        except UserError:
            continue  # of a version with other keys
        if _compared(own) == wanted:
            yield file.parent


def _compared(config: Config) -> str:
    return to_json({k: v for k, v in config.to_dict().items() if k != "tracking"}, sort_keys=True)


def _judged(folder: Path) -> Former:
    summary: dict[str, object] = {}
    if (folder / "summary.json").is_file():
        try:
            summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
        except ValueError:
            return Former(folder, "unusable", "its summary.json can't be read")
    status = summary.get("status", "interrupted")
    if status == "failed":
        return Former(folder, "unusable", "it failed")
    if faults := seal_faults(folder):
        return Former(folder, "unusable", faults[0])
    if reason := _other_code(folder, summary):
        return Former(folder, "unusable", reason)
    if status == "complete" and (folder / FILE).is_file():
        return Former(folder, "complete")
    if any((folder / "checkpoints").glob("[0-9]*")):
        return Former(folder, "partial")
    return Former(folder, "unusable", "it has no checkpoint")


def _other_code(folder: Path, summary: dict[str, object]) -> str:
    """Why a run is of other code than what would go on now; empty if it is not."""
    now = {"clplat": __version__, "git_commit": git_commit()}
    if summary and (other := [k for k in now if summary.get(k) != now[k]]):
        return f"it is of {other[0]} {str(summary.get(other[0]))[:10]}, this is {str(now[other[0]])[:10]}"
    begun = (folder / "config.yaml").stat().st_mtime
    newer = next((path for path in _sources(folder) if path.stat().st_mtime > begun), None)
    return f"{newer} was changed since it began" if newer else ""


def _sources(folder: Path) -> Iterator[Path]:
    """Source files of the platform, of its strategies and streams, and of parts that were named by a file."""
    package = Path(__file__).resolve().parents[1]
    yield from package.rglob("*.py")
    for name in _ROOTS:
        yield from (package.parent / name).rglob("*.py")
    config = resolve(config=folder / "config.yaml")
    for part in (config.strategy, config.stream, config.backbone, config.head, config.merge):
        file = Path(part.name.rpartition(":")[0])
        if ".py:" in part.name and file.is_file():
            yield file
