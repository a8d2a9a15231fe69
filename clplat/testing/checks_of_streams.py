"""Checks of a stream: what its experiences hold, what is kept from a learner, and that a seed repeats it.

Shapes: n samples of an experience, C classes.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from clplat.components.state import rng_state
from clplat.config import discovery
from clplat.config.resolve import expand
from clplat.config.settings import Config
from clplat.data.batches import epoch_order
from clplat.errors import users_code
from clplat.run.build import build_stream, check_stream
from clplat.stream import Data, Kind, Stream
from clplat.testing.result import NotApplicable, expect, listed
from clplat.testing.source import argument_faults
from clplat.testing.subject import FineTuning, State

CHUNK = 512  # samples read at once
TWINS = 2  # test samples may be found in training so many times as often as training samples have a twin there


@dataclass
class StreamSubject:
    """A stream under test.

    Args:
        name: registered name, or `path/to/file.py:Class`.
        keys: of a configuration, as on the command line: options of the stream, the backbone that it speaks to.

    Raises:
        UserError: unknown name or option.
    """

    name: str
    keys: Sequence[str] = ()
    entry: discovery.Entry = field(init=False)
    cls: type[Stream] = field(init=False)
    config: Config = field(init=False)

    def __post_init__(self) -> None:
        self.entry, self.cls = discovery.find("streams", self.name), discovery.load("streams", self.name)
        (self.config,) = expand(["--stream", self.name, "--strategy", "naive", *self.keys])  # of which nothing is run

    def build(self) -> Stream:
        """A new one, of the same seed. Raises as its constructor does."""
        with users_code("stream: "):
            return build_stream(self.config)

    @cached_property
    def stream(self) -> Stream:
        """The one that checks share; nothing may change it."""
        return self.build()


def options(subject: StreamSubject) -> None:
    """No option is ignored, each is documented, and the constructor takes `seed` and `data_root`."""
    faults = argument_faults(subject.cls, Stream, frozenset(discovery.GIVEN["streams"]))
    expect(not faults, "; ".join(faults))


def names(subject: StreamSubject) -> None:
    """Experiences are numbered in order, each has its own name and what its kind needs; kinds are those declared."""
    stream = subject.stream
    expect(len(stream) > 0, "it has no experiences")
    numbers = [e.index for e in stream]
    expect(numbers == list(range(len(stream))), f"experiences have the numbers {numbers[:6]} (valid: 0, 1, 2 …)")
    unnamed = [e.index for e in stream if not e.name.strip()]
    expect(not unnamed, f"experience {unnamed[:1]} has no name")
    faults = check_stream(subject.config, FineTuning, stream)
    expect(not faults, "; ".join(faults))
    declared = getattr(subject.cls, "kinds", None)
    more = sorted({e.kind for e in stream} - set(declared or Kind))
    expect(
        not more, f"it holds kind {listed([str(k) for k in more])}, which {subject.cls.__name__}.kinds does not declare"
    )


def shapes(subject: StreamSubject) -> None:
    """Rows and labels are whole numbers in range, inputs finite and, as prepared, of `input_shape`."""
    stream = subject.stream
    for where, data in _parts(stream):
        rows, labels = data.row_ids(), data.labels
        expect(rows.dtype == torch.int64, f"rows of {where} are {rows.dtype} (valid: torch.int64)")
        low, high, n = int(rows.min()), int(rows.max()), len(data.inputs)
        expect(low >= 0 and high < n, f"rows of {where} go from {low} to {high}, of {n} inputs")
        if labels is not None:
            expect(labels.dtype == torch.int64, f"labels of {where} are {labels.dtype} (valid: torch.int64)")
            expect(len(labels) == n, f"{where} has {len(labels)} labels for {n} inputs")
        for raw in _chunks(data):
            ready = stream.prepare(raw, False)
            shape = tuple(ready.shape[1:])
            expect(
                shape == stream.input_shape,
                f"prepared inputs of {where} have shape {shape}, but input_shape is {stream.input_shape}",
            )
            whole = not ready.is_floating_point() or bool(ready.isfinite().all())
            expect(whole, f"a prepared input of {where} is not finite")


def classes(subject: StreamSubject) -> None:
    """Labels lie below `num_classes`, `classes` are those of the labels, and class names are as many, each its own."""
    stream, count = subject.stream, subject.stream.num_classes
    named = stream.class_names
    expect(not named or len(named) == count, f"{len(named)} class_names for num_classes {count}")
    twice = sorted({n for n in named if named.count(n) > 1})
    expect(not twice, f"class_names has {listed(twice)} more than once")
    seen = 0
    for where, data in _parts(stream):
        if data.labels is None or data.labels.ndim != 1:  # adapted to without, or free text
            continue
        seen += 1
        labels = data.targets().unique().tolist()
        expect(
            labels[0] >= 0 and labels[-1] < count,
            f"labels of {where} go from {labels[0]} to {labels[-1]}, but num_classes is {count}",
        )
    for e in stream:
        told = list(e.classes)
        expect(told == sorted(set(told)), f"classes of {e.name} are {told[:6]} (valid: each once, in order)")
        if e.kind is not Kind.LEARN or e.train is None or e.train.labels is None or e.train.labels.ndim != 1:
            continue
        held = e.train.targets().unique().tolist()
        expect(held == told, f"{e.name} trains on classes {held[:6]}, but its classes are {told[:6]}")
    if not seen:
        raise NotApplicable("its samples have no class labels")


def held_out(subject: StreamSubject) -> None:
    """No test or validation sample is trained on: not by its row, and not by its content more than chance has it.

    Where training samples equal each other, as of few whole numbers, test samples may equal them as well: up to twice
    as often.
    """
    stream, hashes, rows = subject.stream, list[int](), dict[int, set[int]]()
    for e in stream:
        if e.kind in (Kind.LEARN, Kind.FORGET) and e.train is not None:
            new = set(e.train.row_ids().tolist()) - rows.setdefault(id(e.train.inputs), set())
            rows[id(e.train.inputs)] |= new
            hashes += _contents(e.train, sorted(new))
    if not hashes:
        raise NotApplicable("nothing is learned from samples")
    known = set(hashes)
    twins = 1 - len(known) / len(hashes)
    for where, data in _parts(stream, ("test", "valid")):
        both = rows.get(id(data.inputs), set()) & set(data.row_ids().tolist())
        expect(
            not both, f"{where} has {len(both)} of {len(data)} samples that are trained on (row {min(both, default=0)})"
        )
        found = sum(h in known for h in _contents(data, data.row_ids().tolist()))
        share = found / len(data)
        expect(share <= TWINS * twins, f"{found} of {len(data)} samples of {where} equal a sample that is trained on")


def seed(subject: StreamSubject) -> None:
    """The same seed gives the same experiences, whatever was drawn before; no global generator is drawn from."""
    first = subject.stream
    _stir(1)
    state = State.copy({"rng": rng_state()})
    again = subject.build()
    expect(not state.differences(State.copy({"rng": rng_state()})), "building it draws from a global generator")
    expect(len(first) == len(again), f"the same seed gives {len(first)} experiences, then {len(again)}")
    for one, other in zip(first, again, strict=True):
        for name in ("name", "kind", "classes", "task", "request", "env_steps"):
            a, b = getattr(one, name), getattr(other, name)
            expect(a == b, f"the same seed gives {one.name}.{name} {a!r}, then {b!r}")
        for part in ("train", "test", "valid"):
            a, b = _digest(getattr(one, part)), _digest(getattr(other, part))
            expect(a == b, f"the same seed gives other {part} data of {one.name}")
    expect(first.class_names == again.class_names, "the same seed names the classes differently")


def order(subject: StreamSubject) -> None:
    """Which samples come when follows from the seed alone: `arrange` and `world` draw nothing and lose nothing."""
    stream, size = subject.stream, 8
    for e in stream:
        if e.kind not in (Kind.LEARN, Kind.FORGET) or e.train is None:
            continue
        drawn = epoch_order(len(e.train), subject.config.seed, e.index, 0, e.train.inputs.device)
        found = []
        for number in (1, 2):
            _stir(number)
            found.append(stream.arrange(e.train, drawn.clone(), size))
        expect(torch.equal(*found), f"arrange puts the samples of {e.name} in another order each time")
        same = torch.equal(found[0].sort().values, drawn.sort().values)
        expect(same, f"arrange loses or repeats samples of {e.name}")
    for where, data in _parts(stream):
        head, found = torch.arange(min(len(data), CHUNK), device=data.inputs.device), []
        for number in (1, 2):
            _stir(number)
            found.append(data.batch(head)[0])
        expect(_same(*found), f"{where} gives other inputs each time it is read")


def prepare(subject: StreamSubject) -> None:
    """Preparing changes no stored input; it draws only to augment, and then from torch's generator alone."""
    stream = subject.stream
    for where, data in _parts(stream, ("train",)):
        raw = next(_chunks(data))
        kept = raw.clone()
        for training in (False, True):
            found = []
            for number in (1, 2):
                _stir(number)
                if training:
                    torch.manual_seed(5)
                found.append(stream.prepare(raw, training))
            how = "augmenting draws from another generator than torch's" if training else "prepare draws in evaluation"
            expect(_same(*found), f"{how}: inputs of {where} differ from one call to the next")
            expect(_same(raw, kept), f"prepare writes to the stored inputs of {where}")


def _parts(stream: Stream, names: Sequence[str] = ("train", "test", "valid")) -> Iterator[tuple[str, Data]]:
    """Samples of experiences, and what to call them; recorded transitions are none."""
    for e in stream:
        for name in names:
            data: Data | None = getattr(e, name)
            if data is not None and len(data) and not (e.kind is Kind.INTERACT and name == "train"):
                yield f"{e.name} ({name})", data


def _chunks(data: Data) -> Iterator[Tensor]:
    """Inputs as stored, a few at a time."""
    for positions in torch.arange(len(data), device=data.inputs.device).split(CHUNK):
        yield data.batch(positions)[0]


def _contents(data: Data, rows: list[int]) -> list[int]:
    """A number for what each of `rows` of the data set holds, before a world changes it."""
    return [
        hash(row.tobytes())
        for part in torch.tensor(rows, dtype=torch.int64).split(CHUNK)
        for row in data.inputs[part].cpu().numpy()
    ]


def _digest(data: Data | None) -> str:
    """Of rows, labels and inputs."""
    found = hashlib.sha256()
    if data is not None:
        found.update(
            data.row_ids().numpy().tobytes() + (b"" if data.labels is None else data.targets().numpy().tobytes())
        )
        for inputs in _chunks(data):
            found.update(f"{inputs.dtype}".encode() + inputs.contiguous().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool(torch.allclose(a, b, rtol=0, atol=0, equal_nan=True))


def _stir(number: int) -> None:
    """Put the global generators into a state of their own."""
    random.seed(number)
    np.random.seed(number)  # noqa: NPY002 - what a stream might draw from
    torch.manual_seed(number)
