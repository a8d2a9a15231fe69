"""Training through clplat's loop and by a hand-written one in short turns, on the same batches from the same weights.

A turn is one pass over the same data, with a new optimizer, as an experience has it; its first `skip` steps are not
counted, nor is what comes before and after (clplat then evaluates nothing, and saves nothing). Time is the processor's
on a CPU, which neighbours on a shared machine disturb least, and the wall's on another device, read when all its work
is done.

Shapes: n samples, B of a batch, M replayed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.hand import Reservoir
from benchmarks.timing import Row, clock, paired

Loss = Callable[[Any, Tensor, Tensor], Tensor]
"""(net, inputs (B, ...), labels (B,)) → mean loss."""


@dataclass(frozen=True)
class Work:
    """What both sides do.

    Args:
        data: of one turn: inputs (n, ...) and labels (n,), anywhere.
        classes: C.
        batch: B.
        shape: of an input as the model takes it; None: as the data have it.
        device: where it is done.
        precision: as `fabric.precision` has it.
        rounds: pairs of turns at most, after one that is not counted.
        seconds: after which no further pair is begun.
        skip: steps of a turn that are not counted.
        stream: further arguments of the stream (`normalize`, `augment`).
        answers: what the stream tells of its answers, if anything.
    """

    data: tuple[Tensor, Tensor]
    classes: int
    batch: int
    device: torch.device
    precision: Any = "32-true"
    rounds: int = 5
    seconds: float = float("inf")
    skip: int = 1
    shape: tuple[int, ...] | None = None
    stream: dict[str, Any] | None = None
    answers: Any = None

    @property
    def steps(self) -> int:
        return -(-len(self.data[1]) // self.batch)


class Meter:
    """Milliseconds a step of each turn, and its losses; to clplat it is the display, which is told of every step."""

    def __init__(self, work: Work) -> None:
        self.steps, self.skip, self.read = work.steps, work.skip, clock(work.device)
        self.taken, self.started = 0, 0.0
        self.spent: list[float] = []
        self.losses: list[float] = []

    def advance(self, step: int = 0) -> None:
        self.taken += 1
        if self.taken == self.skip:
            self.started = self.read()
        if self.taken == self.steps:
            self.spent.append((self.read() - self.started) / (self.steps - self.skip))
            self.taken = 0

    def show(self, metrics: dict[str, float]) -> None:
        self.losses += [metrics["train/loss"]] if "train/loss" in metrics else []

    def describe(self, experience: Any) -> None: ...

    def scoring(self, done: int, total: int) -> None: ...

    def experience(self, finished: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


class Ours:
    """Training through clplat's runner: each turn is an experience."""

    memory = None  # that is known here

    def __init__(self, strategy: Any, work: Work, fabric: Any = None) -> None:
        from clplat import Data, Experience, Kind, Stream
        from clplat.config.settings import FabricSettings, LoopSettings
        from clplat.run.build import new_record
        from clplat.run.launch import make_fabric
        from clplat.run.loop import Runner
        from clplat.run.runlog import RunLog

        class Unsaved(Runner):
            def save(self) -> None:
                """A checkpoint of a large model would take longer than the turn."""

        if fabric is None:
            fabric = make_fabric(FabricSettings(accelerator=work.device.type, precision=work.precision))  # type: ignore[arg-type]
            fabric.launch()
        data, classes = Data(*work.data), tuple(range(work.classes))
        turns = [Experience(k, f"turn-{k}", Kind.LEARN, data, classes=classes) for k in range(work.rounds + 1)]
        shape = work.shape or tuple(data.inputs.shape[1:])
        stream = Stream(turns, num_classes=work.classes, input_shape=shape, **work.stream or {})
        stream.answers = work.answers
        batch = work.batch // fabric.world_size
        loop = LoopSettings(batch_size=batch, representation=False, checkpoint_seconds=None, log_every=10**9)
        self.work, self.meter = work, Meter(work)
        log = RunLog(None, time.perf_counter(), self.meter)  # type: ignore[arg-type]
        self.runner = Unsaved(strategy, stream, loop, fabric, 0, log, new_record(stream))

    def turn(self, number: int) -> None:
        torch.manual_seed(number)
        self.runner.loop = replace(self.runner.loop, stop_after=number + 1)
        self.runner.flops_per_step = 1.0  # so that no step is taken with its operations counted
        self.runner.run()


class Hand:
    """The loop by hand.

    Args:
        net: on the device.
        loss: of it.
        make: the optimizer of a turn.
        prepare: stored inputs (B, ...) to what the model takes.
        memory: to replay from, in one pass with the new samples; None does not.
    """

    def __init__(
        self, net: Any, loss: Loss, work: Work, make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
        prepare: Callable[[Tensor], Tensor] = lambda x: x, memory: Reservoir | None = None,
    ) -> None:  # fmt: skip
        self.net, self.loss, self.work, self.make = net, loss, work, make
        self.prepare, self.memory = prepare, memory
        self.data = tuple(t.to(work.device) for t in work.data)
        self.meter = Meter(work)

    def turn(self, number: int) -> None:
        torch.manual_seed(number)
        parameters = [p for p in self.net.parameters() if p.requires_grad]
        self.train(self.make(parameters), self.batches(number))

    def batches(self, number: int) -> Iterable[Tensor]:
        """Rows (B,) of each batch of a turn, as clplat draws them."""
        from clplat.data.batches import epoch_order

        return epoch_order(len(self.data[1]), 0, number, 0, self.work.device).split(self.work.batch)

    def train(self, optimizer: torch.optim.Optimizer, batches: Iterable[Tensor]) -> None:
        (inputs, labels), memory, device = self.data, self.memory, self.work.device.type
        losses: list[Tensor] = []
        for rows in batches:
            raw, y = inputs[rows], labels[rows]
            x, new = self.prepare(raw), y
            if memory is not None and memory.seen:
                old, targets = memory.sample()
                x, y = torch.cat([x, self.prepare(old)]), torch.cat([y, targets])
            with torch.autocast(device, torch.bfloat16, enabled=self.work.precision == "bf16-mixed"):
                loss = self.loss(self.net, x, y)
            if memory is not None:
                memory.add(raw, new)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            self.meter.advance()
        self.meter.losses.append(torch.stack(losses).float().mean().item())


def compare(name: str, ours: Ours, hand: Hand | Ours, limit: float | None = None, note: str = "") -> Row:
    """A row of the two in turns: who comes first alternates, and the first pair sets up and is not counted.

    The note tells the largest difference of a turn's mean loss, where nothing but rounding can make one.
    """
    work, ended = hand.work, 0.0
    for number in range(work.rounds + 1):
        for side in (ours, hand) if number % 2 else (hand, ours):
            side.turn(number)
        now = time.monotonic()
        ended = ended or now + work.seconds
        if now > ended and number:
            break
    if hand.memory is None:
        gap = max(abs(a - b) for a, b in zip(ours.meter.losses, hand.meter.losses, strict=True))
        note = f"{note}; " * bool(note) + f"largest difference in loss {gap:.1e}"
    return paired(name, "ms", ours.meter.spent[1:], hand.meter.spent[1:], "ratio", limit, note)
