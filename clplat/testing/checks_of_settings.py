"""Checks of settings that change how a run is computed and must not change what it learns: precision, accumulation."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from clplat.config.settings import FabricSettings
from clplat.errors import UserError
from clplat.lightning import Fabric
from clplat.run.launch import make_fabric
from clplat.strategy import evaluating
from clplat.stream import Kind
from clplat.testing.checks_of_processes import drawn
from clplat.testing.result import NotApplicable, expect, listed
from clplat.testing.streams import CLASSES
from clplat.testing.subject import BATCH, SEED, Outcome, State, Subject

NEAR, LEARNED = 0.05, 0.1  # how far bfloat16 may lead the final loss: a share of it, and of what was learned
TOLERANCE = 1e-5  # between the order of one sum and that of two
PARTS = 2


def mixed(subject: Subject) -> None:
    """With `fabric.precision: bf16-mixed` losses end near those of 32-true, and what is kept stays in 32 bits."""
    plain, stream = subject.straight, subject.stream()
    trial = subject.trial(subject.build(stream), stream, fabric=_in_bfloat16())
    found = subject.finish(trial)
    pairs = [(name, found.state.tensors[name], tensor) for name, tensor in plain.state.tensors.items()]
    wrong = [name for name, mine, other in pairs if mine.dtype != other.dtype]
    expect(not wrong, f"kept in another type than with 32-true: {listed(wrong)}")
    if subject.cls.kinds == {Kind.INTERACT}:  # one action that is rounded otherwise leads elsewhere
        wrong = [name for name, mine, other in pairs if other.isfinite().all() and not mine.isfinite().all()]
        expect(not wrong, f"no longer finite: {listed(wrong)}")
        return
    mine, other = (_loss(subject, outcome) for outcome in (found, plain))
    allowed = NEAR * other + LEARNED * abs(math.log(CLASSES) - other)
    expect(abs(mine - other) <= allowed, f"the loss ends at {mine:.3f}, with 32-true at {other:.3f}")


def accumulation(subject: Subject) -> None:
    """Two batches of B a step end where one of 2 B does, to 1e-5 with SGD, a short last one included."""
    kinds = subject.cls.kinds & {Kind.LEARN, Kind.FORGET}
    if not kinds:
        raise NotApplicable("a batch to adapt to is answered when it comes, and an environment takes a step at a time")
    if any(isinstance(m, _BatchNorm) for m in subject.straight.strategy.modules()):
        raise NotApplicable("batch normalisation takes the statistics of each batch")
    if subject.cls.whole_batch:
        raise NotApplicable(subject.cls.whole_batch)
    try:
        whole, parts = (_accumulated(subject, n) for n in (1, PARTS))
    except UserError as error:
        raise NotApplicable("; ".join(error.faults)) from None
    wrong = _other(whole, parts)
    if not wrong:
        return
    if drawn(subject) or _other(_accumulated(subject, PARTS, SEED + 1), parts):
        raise NotApplicable("it draws for each batch: sums over two are over other draws, the same in expectation")
    expect(False, f"two batches of {BATCH // PARTS} end elsewhere than one of {BATCH}: {listed(wrong)}")


@cache
def _in_bfloat16() -> Fabric:
    return make_fabric(FabricSettings(accelerator="cpu", precision="bf16-mixed"))


def _loss(subject: Subject, outcome: Outcome) -> float:
    """Mean cross-entropy on the training data of the stream, of classes that have a probability."""
    losses = list[Tensor]()
    for data in (e.train for e in outcome.stream if e.train is not None and e.kind is not Kind.INTERACT):
        inputs, labels = data.all()[0], data.targets()
        if subject.cls.needs_text:
            with torch.no_grad(), evaluating(outcome.strategy):
                losses.append(outcome.strategy.losses(inputs, labels))
            continue
        own = F.cross_entropy(subject.answers(outcome.strategy, inputs).float(), labels, reduction="none")
        losses.append(own[own.isfinite()])
    return float(torch.cat(losses).mean())


def _other(mine: State, other: State) -> list[str]:
    """Tensors that differ; plain values are sums of losses, say, which are rounded in another order."""
    return State(other.plain, mine.tensors).differences(other, TOLERANCE)


def _accumulated(subject: Subject, parts: int, draws: int = SEED) -> State:
    """The state after a run whose steps take BATCH samples in so many parts; what it draws comes from `draws`."""
    stream = subject.stream({Kind.ADAPT, Kind.INTERACT})
    strategy = subject.build(stream, **subject.options(parts))
    how: dict[str, Any] = {"reseed": True, "draws": 1000 * draws}
    trial = subject.trial(strategy, stream, batch_size=BATCH // parts, accumulate=parts, **how)
    return subject.finish(trial).state
