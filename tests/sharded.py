"""Small runs on sharded weights, and processes that do them: two of gloo, started once for all runs."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric.plugins import MixedPrecision
from texts import write_sets
from torch.distributed.fsdp import FSDPModule

from clplat.config.resolve import resolve
from clplat.config.settings import FabricSettings
from clplat.errors import Interrupted
from clplat.lightning import Fabric
from clplat.run import checkpoint, compiling
from clplat.run.launch import _work, make_fabric
from clplat.strategies.er import ER
from clplat.strategies.naive import Naive
from clplat.stream import Experience

LOOP = {"max_steps": 2, "batch_size": 6, "clip_norm": 0.5, "accumulate": 2, "stop_after": 2, "checkpoint_seconds": None,
        "evaluate": "last", "representation": False}  # fmt: skip
IMAGES = {"stream": "digits", "backbone": {"name": "vit_micro", "dim": 16, "depth": 2, "heads": 2}}
SHARDED = Path(__file__)
REPLAY = {"memory": 30, "replay_batch": 4}
ADAPTERS = {"optimizer": "sgd", "lr": 0.1, "dropout": 0.0, "rank": 2}


class Stopped(ER):
    """ER whose process is told to stop after its fourth step, where no file says that it was.

    Args:
        told: the file.
    """

    unshardable = ""
    plain_passes = True

    def __init__(self, *, told: str, **base):
        super().__init__(**base)
        self.told, self.taken = Path(told), 0

    def after_step(self) -> None:
        self.taken += 1
        if self.rank == 0 and self.taken == 4 and not self.told.exists():
            self.told.touch()
            os.kill(os.getpid(), signal.SIGTERM)


class Halted(Naive):
    """Fine-tuning that stops as `Stopped` does: what it learns does not depend on the number of processes.

    Args:
        told: the file.
    """

    unshardable = ""
    plain_passes = True

    def __init__(self, *, told: str, **base):
        super().__init__(**base)
        self.told, self.taken = Path(told), 0

    after_step = Stopped.after_step


class Apart(Naive):
    """Fine-tuning whose processes draw other numbers when the head grows."""

    unshardable = ""
    plain_passes = True

    def grow(self, experience: Experience) -> None:
        torch.rand(self.rank)
        super().grow(experience)

    def measurements(self) -> dict[str, float]:
        """How many parts of the backbone are brought together each by itself."""
        return {"parts": float(sum(isinstance(m, FSDPModule) for m in self.model.backbone.modules()))}


def texts(folder: Path, **backbone: Any) -> dict[str, Any]:
    """Two tasks of texts."""
    sets = folder / "sets"
    if not sets.is_dir():
        write_sets(sets)
    stream = {"name": "text", "benchmark": "jsonl", "path": str(sets), "tasks": ["color", "size"], "tokenizer": "bytes",
              "max_length": 32}  # fmt: skip
    return {"stream": stream, "backbone": {"vocabulary": 300, "dim": 16, "depth": 2, "heads": 2, **backbone}}


def pictures(folder: Path) -> dict[str, Any]:
    """Two sets of pictures for CLIP."""
    draw = np.random.default_rng(0)
    for name, shape in {"mnist": (28, 28), "cifar10": (32, 32, 3)}.items():
        (folder / name).mkdir(parents=True, exist_ok=True)
        for part in ("train", "test"):
            labels = np.tile(np.arange(10), 3)
            np.savez(
                folder / name / f"{part}.npz", images=draw.integers(0, 256, (30, *shape), dtype=np.uint8), labels=labels
            )
    stream = {"name": "clip", "tasks": ["mnist", "cifar10"], "shots": 3, "image_size": 16}
    backbone = {"name": "clip", "dim": 16, "depth": 1, "heads": 2}
    return {"stream": stream, "backbone": backbone, "data_root": str(folder)}


def config(folder: Path, given: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A run in `folder`."""
    fabric = {"accelerator": "cpu", "threads": 1, **given.get("fabric", {}), **more.pop("fabric", {})}
    found = {"tracking": {"enabled": False}, "seed": 3, "output": str(folder), **given, "fabric": fabric}
    return found | {"loop": LOOP | given.get("loop", {}) | more.pop("loop", {})} | more


def on_processes(
    jobs: list[dict[str, Any]], settings: FabricSettings | None = None, do: Callable[..., None] | None = None
) -> None:
    """Do runs one after the other, in processes that are started once; in this one where nothing is said.

    Args:
        jobs: "config" of a run; "resume": it is stopped on its way, and gone on with; "left": others have stopped it.
        do: what does them in each process; None: `_do`.
    """
    if settings is None:
        fabric = make_fabric(FabricSettings(accelerator="cpu"))
        fabric.launch()
        _do(fabric, jobs)
        return
    before = dict(os.environ)
    try:
        make_fabric(settings).launch(do or _do, jobs)
    finally:
        for key in os.environ.keys() - before.keys():  # the launcher leaves its port
            del os.environ[key]


def _do(fabric: Fabric, jobs: list[dict[str, Any]]) -> None:
    for job in jobs:
        given = resolve(config=job["config"])
        if mixed := given.fabric.precision == "bf16-mixed":
            plain, fabric._precision = fabric._precision, MixedPrecision("bf16-mixed", "cpu")
        if not job.get("left"):
            with suppress(Interrupted):
                _work(fabric, given, None, None, True, False, None)
        if job.get("resume") or job.get("left"):
            (stopped,) = Path(given.output).rglob("config.yaml")
            _work(fabric, given, stopped.parent, None, True, True, None)
        if mixed:
            fabric._precision = plain


def alone(fabric: Fabric, jobs: list[dict[str, Any]]) -> None:
    """As `_do`, in the one process that torchrun has started of those that were asked for."""
    os.environ |= {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    _do(fabric, jobs)


def stubbed_too(fabric: Fabric, jobs: list[dict[str, Any]]) -> None:
    """As `_do`; what is compiled is traced, and run as it is."""
    compiling.OPTIONS = {"dynamic": True, "backend": "eager"}
    _do(fabric, jobs)


def ended(folder: Path) -> dict[str, Any]:
    """The state of the last checkpoint of the one run in `folder`."""
    (checkpoints,) = folder.rglob("checkpoints")
    state, _ = checkpoint.load_newest(checkpoints)
    assert state is not None
    return state
