"""Runs of the conformance suite's little stream by weights that processes share out, and by one process."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from clplat.components.shards import whole
from clplat.config import discovery
from clplat.errors import Interrupted
from clplat.lightning import Fabric
from clplat.run import checkpoint
from clplat.strategy import evaluating
from clplat.testing.streams import TinyStream
from clplat.testing.subject import BACKBONES, SEED, State, Subject, Trial

BATCH = 5
VIT, CLIP = BACKBONES[1], BACKBONES[3]
# Adam makes whole steps of rounding where a gradient is zero, as that of the keys' biases is.
ALSO = {"forget_optimizer": "sgd", "forget_lr": 0.05, "average_start": 0}
STOPPED = ["npo"]  # and gone on with


def trial(name: str, fabric: Fabric | None, **how: Any) -> Trial:
    """A run of one epoch an experience as a rule, of batches of 2 · BATCH over all processes."""
    subject, world = Subject(name), fabric.world_size if fabric else 1
    subject.__dict__["backbone"] = CLIP if name == "vr_lwf" else VIT
    known = {o.name for o in discovery.options(subject.entry)}
    own = {k: v for k, v in ALSO.items() if k in known}
    stream = TinyStream(subject.cls.kinds)
    strategy = subject.build(stream, **subject.options(world), **own)
    made = subject.trial(strategy, stream, fabric=fabric, batch_size=2 * BATCH // world, seed=SEED, **how)
    epochs = 3 if name == "gs_lora_pp" else None  # of a request, so that its average is not the weights themselves
    made.loop = replace(made.loop, max_epochs=1, forget_epochs=epochs, eval_every=None)
    return made


def ended(run: Trial) -> dict[str, Any]:
    """What a run ends with, sharded weights brought together; a collective call."""
    run.run()
    state = State.copy(whole(dict(run.strategy.state_dict(keep_vars=True)), keep=True))
    assert isinstance(run.stream, TinyStream)
    with evaluating(run.strategy), torch.no_grad():
        answers = run.strategy.predict(run.stream.probe)
    return {"tensors": state.tensors, "matrix": run.record.matrix, "answers": answers}


def resumed(name: str, fabric: Fabric, steps: int) -> dict[str, Any]:
    """The run, stopped after so many steps and gone on with from the state that process 0 holds."""
    half = trial(name, fabric, stop_at=steps)
    with suppress(Interrupted):
        half.run()
    given = [half.latest]
    torch.distributed.broadcast_object_list(given)
    return ended(trial(name, fabric, state=given[0]))


def work(fabric: Fabric, names: list[str], folder: Path) -> None:
    """All runs of one process, each found in a folder by name and rank."""
    torch.set_num_threads(1)
    for name in names:
        run = trial(name, fabric)
        found = {"straight": ended(run)}
        if name in STOPPED:
            found["resumed"] = resumed(name, fabric, run.progress.total_steps - 1)
        checkpoint.save(folder / name / str(fabric.global_rank), 0, found)
