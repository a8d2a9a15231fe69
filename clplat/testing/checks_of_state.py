"""Checks of what a strategy keeps: it can be saved, comes back whole, is enough to go on with, and stays bounded."""

from __future__ import annotations

import dataclasses
import json
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from clplat.metrics.cost import stored_bytes
from clplat.run import checkpoint
from clplat.strategy import Strategy
from clplat.stream import Experience, Kind
from clplat.testing.result import NotApplicable, expect, listed
from clplat.testing.subject import SEED, Outcome, State, Subject, measured

REPEAT = 4  # how many times the samples of the plain stream an experience of the longer stream has
SLACK_FRACTION, SLACK_BYTES = 0.05, 2048  # growth that counts as none; ten samples take 1920 bytes


def state(subject: Subject) -> None:
    """State survives the trip through JSON and safetensors bit for bit, into a new learner that was grown alike."""
    outcome = subject.straight
    plain, tensors = json.loads(json.dumps(outcome.state.plain)), load(save(_contiguous(outcome.state)))
    _reloads(subject, outcome, checkpoint.unflatten(plain, tensors), lambda e: e.seen())


def growth(subject: Subject) -> None:
    """Growing needs no data: replayed without any, as clplat.load does, it gives what the checkpoint fills."""
    _reloads(
        subject,
        subject.straight,
        checkpoint.unflatten(subject.straight.state.plain, subject.straight.state.tensors),
        lambda e: Experience(e.index, e.name, e.kind, None, classes=e.classes, task=e.task),
    )


def _contiguous(state: State) -> dict[str, Tensor]:
    return {name: t.contiguous() for name, t in state.tensors.items()}


def _reloads(
    subject: Subject, outcome: Outcome, state: dict[str, Any], given: Callable[[Experience], Experience]
) -> None:
    """Build from another seed, grow with what `given` makes of each experience, load, compare."""
    stream = subject.stream()
    other = subject.build(stream, seed=SEED + 1)
    other.train()
    for experience in stream:
        other.grow(given(experience))
    keys = other.load_state_dict(state, strict=True)
    expect(not keys.missing_keys and not keys.unexpected_keys, f"loading is not strict: {keys}")
    wrong = outcome.state.differences(State.of(other))
    expect(not wrong, f"not as it was saved: {listed(wrong)}")
    same = torch.equal(subject.answers(outcome.strategy, stream.probe), subject.answers(other, stream.probe))
    expect(same, "the loaded learner predicts differently: something that matters is not in its state")


def resume(subject: Subject, once: bool = False) -> None:
    """A run that is stopped anywhere, or `once` midway, and gone on with ends as the run that was not, bit for bit."""
    straight = subject.straight
    stops = list(_stops(straight))
    for name, stop in stops[len(stops) // 2 :][:1] if once else stops:
        resumed = subject.resumed(stop)
        wrong = straight.state.differences(resumed.state)
        expect(not wrong, f"stopped {name}, it ends elsewhere: {listed(wrong)}")
        mine, theirs = measured(straight.record), measured(resumed.record)
        wrong = [key for key in mine if mine[key] != theirs.get(key)]
        expect(not wrong, f"stopped {name}, it measures something else: {listed(wrong)}")


def _stops(outcome: Outcome) -> Iterator[tuple[str, int]]:
    """Where to stop: within each experience, at the last step of the first of each kind, after the very first step."""
    done, kinds = 0, set[Kind]()
    for experience in outcome.stream:
        steps = outcome.steps.get(experience.index, 0)
        places = {(steps + 1) // 2, *([steps] if experience.kind not in kinds else []), *([] if done else [1])}
        for step in sorted(places):
            if 0 < step <= steps:
                yield f"after step {step} of {steps} of {experience.name}", done + step
        kinds.add(experience.kind)
        done += steps


def memory(subject: Subject) -> None:
    """What is kept does not grow with the samples of an experience, once a memory is full."""
    if subject.cls.unbounded_memory:
        raise NotApplicable("it declares unbounded_memory")
    few, many = subject.straight, subject.run(repeat=REPEAT, flops=True)  # a step can be counted, too
    for what, size in (("its state", stored_bytes), ("what it holds outside its state", held_bytes)):
        small, large = size(few.strategy), size(many.strategy)
        expect(
            large <= small * (1 + SLACK_FRACTION) + SLACK_BYTES,
            f"{what} grows from {small} to {large} bytes with {REPEAT} times the samples "
            "(if this is meant, set unbounded_memory = True)",
        )


def held_bytes(strategy: Strategy) -> int:
    """Bytes of tensors, arrays and numbers in the attributes of a strategy's modules, outside parameters and buffers.

    Follows containers and plain objects; not functions, nor what the runner set.
    """
    seen: set[int] = set()
    total = 0
    waiting: deque[Any] = deque()
    for module in strategy.modules():
        seen.add(id(module))
        ours = {"raw", "_prepare", "_parameters", "_buffers", "_modules", "_fabric", "_trainer"}
        waiting += [v for k, v in vars(module).items() if k not in ours]
    while waiting:
        value = waiting.pop()
        if isinstance(value, int | float | complex) and not isinstance(value, bool):
            total += 8
            continue
        if id(value) in seen or value is None:
            continue
        seen.add(id(value))
        if isinstance(value, nn.Parameter):
            continue
        if isinstance(value, Tensor | np.ndarray):
            total += value.nbytes
        elif isinstance(value, str | bytes):
            total += len(value)
        elif isinstance(value, dict):
            waiting += [*value.keys(), *value.values()]
        elif isinstance(value, list | tuple | set | frozenset | deque):
            waiting += value
        elif dataclasses.is_dataclass(value) or type(value).__module__ == strategy.__module__:
            waiting += vars(value).values() if hasattr(value, "__dict__") else ()
    return total
