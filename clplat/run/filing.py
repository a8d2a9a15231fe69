"""Memories whose inputs are in files of the run's folder, `memory/<name>.<process>.rows`: see `components/filed.py`."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from clplat.components.filed import Filed
from clplat.components.memory import Bounded
from clplat.config.settings import Config
from clplat.errors import UserError
from clplat.lightning import Fabric
from clplat.run import checkpoint
from clplat.run.checkpoint import KEEP
from clplat.strategy import Strategy

FOLDER = "memory"


def prepare(config: Config, strategy: Strategy, run_dir: Path, fabric: Fabric, state: dict[str, Any] | None) -> None:
    """Have memories in files where that is asked for.

    Args:
        state: of the checkpoint that is gone on from; None: the run begins.

    Raises:
        UserError: it was written by more or fewer processes than there are.
    """
    if not config.loop.memory_on_disk:
        return
    before = fabric.world_size if state is None else len(state["processes"])
    if before != fabric.world_size:
        what = f"{before} processes have a file each, and {fabric.world_size} would go on"
        raise UserError(f"loop.memory_on_disk: {what} (valid: as many as before)")
    file_memories(strategy, run_dir, fabric.global_rank, goes_on=True)


def file_memories(strategy: Strategy, run_dir: Path, rank: int, *, goes_on: bool) -> None:
    """Have the bounded memories of a strategy keep their inputs in files, each process in its own.

    Args:
        goes_on: whether what is restored will be written to; else it is only read.
    """
    for name, module in strategy.named_modules():
        if isinstance(module, Bounded):
            module.file, module.goes_on = run_dir / FOLDER / f"{name}.{rank}.rows", goes_on
    if goes_on:
        (run_dir / FOLDER).mkdir(exist_ok=True)


def faults(config: Config, strategy: Strategy) -> list[str]:
    """Why memories can't be in files, where that is asked for; one line each."""
    found = []
    if config.loop.memory_on_disk and not any(isinstance(module, Bounded) for module in strategy.modules()):
        found.append(f"{type(strategy).__name__} has no memory of samples that is bounded and drawn from")
    if config.loop.memory_on_disk and config.fabric.strategy == "fsdp":
        found.append("fabric.strategy is fsdp, whose processes may write checkpoints apart")
    return [f"loop.memory_on_disk: true, but {what} (valid: false)" for what in found]


def filed(strategy: Strategy) -> list[Filed]:
    """What of a strategy's memories is in files."""
    return [held for module in strategy.modules() if isinstance(module, Bounded) for held in module.filed()]


def checkpointed(strategy: Strategy) -> None:
    """Tell the files that a checkpoint is about to be written, and that the one before is whole on all processes."""
    for held in filed(strategy):
        held.checkpointed(KEEP)


def let_go(strategy: Strategy) -> None:
    """Empty what no kept checkpoint knows of; the last one is whole."""
    for held in filed(strategy):
        held.let_go(KEEP)


def purge(run_dir: Path) -> None:
    """Remove all checkpoints but the newest, and from files of memories what that one does not know of."""
    for old in sorted(p for p in (run_dir / "checkpoints").glob("[0-9]*") if p.is_dir())[:-1]:
        shutil.rmtree(old)
    state, _ = checkpoint.load_newest(run_dir / "checkpoints")
    if state is None:
        return
    names = [key.removesuffix(".filed.inputs.at") for key in state["strategy"] if key.endswith(".filed.inputs.at")]
    for name in names:
        own = f"{name}.filed.inputs."
        known = {k.removeprefix(own): t for k, t in state["strategy"].items() if k.startswith(own)}
        for file in (run_dir / FOLDER).glob(f"{name}.*.rows"):
            Filed.restored(file, known, go_on=True).let_go(0)
