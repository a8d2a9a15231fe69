"""Two processes with batches of B end where one process with batches of 2 B ends, short last batches included."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from clplat.config.settings import FabricSettings
from clplat.errors import UserError
from clplat.lightning import Fabric
from clplat.run import checkpoint
from clplat.run.launch import make_fabric
from clplat.stream import Kind
from clplat.testing.result import CheckFailed, NotApplicable, expect, listed
from clplat.testing.streams import TinyStream
from clplat.testing.subject import SEED, State, Subject

PROCESSES, BATCH, TOLERANCE = 2, 5, 1e-5
PATIENCE = timedelta(seconds=60)  # a strategy that communicates on one process only must not hang for ever


def processes(subject: Subject) -> None:
    """Two processes (gloo) end where one does that has their batches together, to 1e-5 with SGD."""
    if subject.cls.kinds == {Kind.INTERACT}:
        raise NotApplicable("an environment is not split between processes")
    compare(subject, in_processes([subject.name])[subject.name])


def in_processes(names: list[str]) -> dict[str, Any]:
    """For each strategy what its two processes ended with, for `compare`; all in one pair of processes."""
    settings = FabricSettings(accelerator="cpu", devices=PROCESSES, strategy="ddp")
    raised: dict[str, Any] = {}
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="clplat-check-") as folder:
        try:
            fabric = make_fabric(settings)
            strategy: Any = fabric.strategy
            strategy._timeout = PATIENCE
            fabric.launch(_worker, names, folder)
        except Exception as error:  # noqa: BLE001 - of one strategy, which ends the processes; start others for the rest
            raised = {"raised": str(error).strip().splitlines()[-1]}
        finally:
            for key in os.environ.keys() - environment.keys():  # the launcher leaves its port
                del os.environ[key]
        found = {name: _read(Path(folder) / str(i)) or raised for i, name in enumerate(names)}
    culprit = next((i for i, name in enumerate(names) if "raised" in found[name]), len(names))
    return found | (in_processes(names[culprit + 1 :]) if names[culprit + 1 :] else {})


def _read(folder: Path) -> dict[str, Any] | None:
    """What both processes left in `folder`; None if one left nothing."""
    ended = [checkpoint.load_newest(folder / str(rank))[0] for rank in range(PROCESSES)]
    if None in ended:
        return None
    refused = [e["refused"] for e in ended if e and "refused" in e]
    return {"refused": refused[0]} if refused else {"states": ended}


def _worker(fabric: Fabric, *given: Any) -> None:
    names, folder = given
    torch.set_num_threads(1)
    for index, name in enumerate(names):
        try:
            found: dict[str, Any] = dict(_run(Subject(name), fabric, BATCH).tensors)
        except UserError as error:
            found = {"refused": "; ".join(error.faults)}
        checkpoint.save(Path(folder) / str(index) / str(fabric.global_rank), 0, found)


def _run(subject: Subject, fabric: Fabric | None, batch_size: int) -> State:
    stream = TinyStream(subject.cls.kinds - {Kind.INTERACT})
    strategy = subject.build(stream, **subject.options(fabric.world_size if fabric else 1))
    if any(isinstance(m, _BatchNorm) for m in strategy.modules()):
        strategy.lr = 0.0005  # on a handful of values it makes rounding grow a hundredfold with each larger step
    return subject.finish(subject.trial(strategy, stream, fabric=fabric, batch_size=batch_size, seed=SEED)).state


def compare(subject: Subject, found: Any) -> None:
    """Judge what `in_processes` found."""
    if "refused" in found:
        raise NotApplicable(found["refused"])
    if "raised" in found:
        raise CheckFailed(f"raised on two processes: {found['raised']}")
    one = _run(subject, None, PROCESSES * BATCH)
    for rank, tensors in enumerate(found["states"]):
        wrong = State(one.plain, tensors).differences(one, TOLERANCE)
        expect(not wrong, f"process {rank} of two ends elsewhere than one process: {listed(wrong)}")
