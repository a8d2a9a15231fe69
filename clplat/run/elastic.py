"""A run under torchrun: found again when its processes are started anew, and shared by those there are.

torchrun gives the processes of a job one id, whichever attempt it is. The first attempt leaves it in the run's folder;
later ones find the run by it and go on from its last checkpoint. There may be fewer of them than were asked for: each
then takes more of a step's batch, so that steps, positions in the data and learning rates are what they were.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clplat.config.reading import read_yaml
from clplat.config.settings import Config
from clplat.errors import UserError
from clplat.files import to_json, write_atomic
from clplat.lightning import Fabric
from clplat.run.summary import changes

FILE = "torchrun.json"


def job() -> str | None:
    """The id of torchrun's job; None outside of one, and where it was given none, as of several machines it must be."""
    found = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return None if found == "none" else found


def from_outside(machines: int) -> bool:
    """Whether this process is one of several that torchrun, SLURM or, on several `machines`, the user has started.

    Raises:
        UserError: nothing says where the other machines are: this one would wait for half an hour.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ or int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return True
    if machines > 1 and "MASTER_ADDR" not in os.environ:
        valid = "valid: 1; more under torchrun or SLURM, or with MASTER_ADDR, MASTER_PORT and NODE_RANK set"
        raise UserError(f"fabric.num_nodes: {machines}, but nothing says where the other machines are ({valid})")
    return machines > 1


def mark(run_dir: Path) -> None:
    """Leave the job's id in the folder of a run that it begins; says what would let an attempt after it fail."""
    if job() is None:
        return
    write_atomic(run_dir / FILE, to_json({"id": job()}))
    given = os.environ
    if given.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0" and given.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        said = (
            "processes that torchrun starts anew may miss each other: set TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for it"
        )
        print(f"clplat: {said}", file=sys.stderr, flush=True)


def begun(fabric: Fabric, config: Config) -> Path | None:
    """Folder of the run of this configuration that this job has begun; None where it has begun none. Collective."""
    if job() is None:
        return None
    found = None
    for file in sorted(Path(config.output, str(config.name)).glob(f"*-{config.seed}*/{FILE}")):
        same = json.loads(file.read_text(encoding="utf-8")) == {"id": job()}
        if same and not changes(read_yaml(file.parent / "config.yaml"), config):
            found = str(file.parent)
    found = fabric.broadcast(found)  # what process 0 has seen: it alone makes folders
    return None if found is None else Path(found)


def shared(config: Config) -> Config:
    """The configuration for the processes there are, where torchrun has started fewer than were asked for.

    Raises:
        UserError: they can't share the batch.
    """
    asked = config.fabric.devices * config.fabric.num_nodes
    there = int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" not in os.environ or there >= asked:
        return config
    whole, here = config.loop.batch_size * asked, int(os.environ["LOCAL_WORLD_SIZE"])
    if whole % there:
        given = f"loop.batch_size: {config.loop.batch_size} on each of {asked} processes"
        raise UserError(
            f"{given} can't be shared by the {there} that torchrun has started (valid: multiples of {there})"
        )
    fabric = replace(config.fabric, devices=here, num_nodes=there // here)
    return replace(config, fabric=fabric, loop=replace(config.loop, batch_size=whole // there))


def change(before: int, now: int, step: int) -> str:
    """What is said of a run whose number of processes changes; empty where it does not."""
    return "" if before == now else f"on {now} process{'es' * (now > 1)} from step {step} on, where it was {before}"


def inherited(processes: Sequence[dict[str, Any]], rank: int, world: int) -> dict[str, Any]:
    """What process `rank` of `world` goes on with of what those had that saved a checkpoint.

    Of as many, its own. Counts and predictions of others are those of the process whose turn it is, so that nothing is
    counted twice or left out; random states are those of one of them, as all begin with the same.
    """
    held, own = processes[rank::world], processes[rank % len(processes)]
    losses = zip(*(p.get("losses", ()) for p in held or [own]), strict=True)
    return {
        "rng": own["rng"],
        "online": {key: sum(p["online"][key] for p in held) for key in own["online"]},
        "losses": [torch.stack(several).mean(0) for several in losses],
        "predictions": [p["predictions"] for p in held if p.get("predictions")],
    }
