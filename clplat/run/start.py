"""Weights to start from: those of another run, which is made first where it is not there yet, once for all runs."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from clplat.backbones._weights import fit
from clplat.backbones.base import Classifier
from clplat.config.settings import Config
from clplat.errors import UserError
from clplat.run import checkpoint
from clplat.strategy import Strategy

Launch = Callable[..., Any]


def start_run(config: Config, launch: Launch | None) -> Path | None:
    """Folder of the finished run that `config.start.run` names; None where it names none.

    A configuration is run into `<output>/start/<name>-<digest>/` with its own seed, gone on with where it was cut
    off, and found there by all later runs.

    Args:
        launch: runs what is not there yet: `launch(config, folder, resumed=...)`; without it None is returned for it.

    Raises:
        UserError: neither a run nor a configuration, or the run is not finished.
    """
    named = config.start.run
    if named is None:
        return None
    folder = Path(named)
    if (folder / "summary.json").is_file():
        _check_complete(folder)
        return folder
    source = _resolve(config, named)
    folder = _folder(source)
    if (folder / "summary.json").is_file() and _status(folder) == "complete":
        return folder
    if launch is None:
        return None
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"start.run: {named} has not been run under {config.output}; run it first, on one process")
    launch(source, folder, resumed=(folder / "checkpoints").is_dir())
    return folder


def start_from(model: Classifier, folder: Path, *, head: bool) -> list[str]:
    """Give `model` the weights of the run in `folder`; returns faults, one line each.

    Args:
        head: the head's too.
    """
    state, _ = checkpoint.load_newest(folder / "checkpoints")
    if state is None:
        return [f"start.run: {folder} holds no whole checkpoint"]
    try:
        for part, key in (("backbone", "start.run"), ("head", "start.head"))[: 1 + head]:
            own = f"model.{part}."
            weights = {n.removeprefix(own): t for n, t in state["strategy"].items() if n.startswith(own)}
            fit(getattr(model, part), weights, f"the {part} of {folder}", lambda _: False, key)
    except UserError as error:
        return list(error.faults)
    return []


def carried_optimizer(folder: Path, strategy: Strategy) -> dict[str, Any] | None:
    """What the run in `folder` left of its optimizer for `strategy` to go on with; None where it left nothing.

    Of its parameter groups those are taken that `strategy` has, in order: what comes last may be new or gone.

    Raises:
        UserError: the groups are of other sizes.
    """
    state, _ = checkpoint.load_newest(folder / "checkpoints")
    left = state["resumed"] if state is not None and strategy.carries_optimizer else None
    if left is None:
        return None
    groups = strategy.configure_optimizers().state_dict()["param_groups"]
    saved, own = ([len(g["params"]) for g in gs] for gs in (left["optimizer"]["param_groups"], groups))
    shared = min(len(saved), len(own))
    if saved[:shared] != own[:shared]:
        raise UserError(
            f"start.run: the optimizer of {folder} holds {saved} parameters in its groups, this strategy's {own} "
            "(valid: the architecture of the start run)"
        )
    kept = {i for group in groups[:shared] for i in group["params"]}
    moments = {i: m for i, m in left["optimizer"]["state"].items() if i in kept}
    rates = [g["lr"] for g in groups]
    return {"optimizer": {"state": moments, "param_groups": groups}, "learning_rates": rates}


def _resolve(config: Config, named: str) -> Config:
    """The configuration to run first, with this run's places."""
    from clplat.config.resolve import resolve

    try:
        source = resolve(config=named)
    except UserError as error:
        raise UserError(*(f"start.run: {named}: {fault}" for fault in error.faults)) from error
    if source.start.run is not None:
        raise UserError(f"start.run: {named} itself starts from a run ({source.start.run}); name that one's folder")
    return replace(source, output=config.output, data_root=config.data_root, tracking=config.tracking)


def _folder(source: Config) -> Path:
    from clplat.run.summary import config_sha256

    return Path(source.output) / "start" / f"{str(source.name).replace('/', '-')}-{config_sha256(source)[:12]}"


def _check_complete(folder: Path) -> None:
    if _status(folder) != "complete":
        raise UserError(f"start.run: the run in {folder} is not finished (go on: clplat run --resume {folder})")


def _status(folder: Path) -> Any:
    import json

    try:
        return json.loads((folder / "summary.json").read_text(encoding="utf-8")).get("status")
    except (OSError, ValueError) as error:
        raise UserError(f"start.run: {folder / 'summary.json'} can't be read ({error})") from error
