"""Milliseconds of a training step through clplat and through the hand-written loop, one experience of each in turn.

They are the processor's, which neighbours on a shared machine disturb least; those on the wall stand in the note.

Both sides keep a clock that is read after every step. A step's time is the mean over the steps of an experience after
its first epoch, flushes of the log included; setting up, evaluating and saving are measured elsewhere. The first epoch
holds the step whose operations are counted.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import hand
from benchmarks.timing import Row, paired

# Experiences of a tenth of a second (MLP) or some seconds (ViT): short turns, so that a busy machine slows both sides.
EPOCHS, SEEDS = {"mlp": 10, "vit_tiny": 2}, {"mlp": 6, "vit_tiny": 1}


class Clock:
    """Reads the time after each step. To clplat it is the display, which is told of every step in any case."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.losses: list[float] = []

    def advance(self, step: int) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())

    def take(self, skip: int) -> tuple[float, float]:
        """Milliseconds a step on the wall and on the processor since the `skip`-th step, and start again."""
        steps = len(self.wall) - skip
        spent = tuple(1000 * (t[-1] - t[skip - 1]) / steps for t in (self.wall, self.cpu))
        self.wall, self.cpu = [], []
        return spent[0], spent[1]

    def show(self, metrics: dict[str, float]) -> None:
        self.losses += [metrics["train/loss"]] if "train/loss" in metrics else []

    def describe(self, experience: Any) -> None: ...

    def scoring(self, done: int, total: int) -> None: ...

    def experience(self, finished: int, metrics: dict[str, float]) -> None: ...

    def close(self) -> None: ...


@dataclass
class Samples:
    """What one side gave: milliseconds a step for each experience, mean losses, and the final accuracies."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    accuracies: list[float] = field(default_factory=list)


def ours(model: str, method: str, epochs: int, seed: int, run_dir: Path) -> Generator[Samples, None, None]:
    """Train through clplat's runner, one experience at a time."""
    runner, clock = make_runner(model, method, epochs, seed, run_dir)
    samples = Samples()
    try:
        for index, experience in enumerate(runner.stream):
            runner.loop = replace(runner.loop, stop_after=index + 1)
            runner.run()
            wall, cpu = clock.take(skip=-(-len(experience.train) // hand.BATCH))
            samples.wall.append(wall)
            samples.cpu.append(cpu)
            # Losses are logged as means over 50 steps and over what is left at the end.
            samples.losses.append(clock.losses[-1])
            samples.accuracies = runner.record.matrix[-1]
            yield samples
    finally:
        runner.log.close()


def theirs(model_name: str, method: str, epochs: int, seed: int) -> Iterator[Samples]:
    """Train by hand on the same data in the same order from the same initial weights."""
    from clplat.config.settings import LoopSettings
    from clplat.data.batches import epoch_order

    stream = seed_and_stream(model_name, method, epochs, seed)
    model = hand.MODELS[model_name]()
    samples, clock = Samples(), Clock()
    memory = hand.Reservoir(stream[0].train.inputs[0])
    tests = [e.test.all() for e in stream]
    test_x, test_y = (torch.cat(parts) for parts in zip(*tests, strict=True))
    sets = torch.repeat_interleave(torch.tensor([len(y) for _, y in tests]))
    for index, experience in enumerate(stream):
        x, y = experience.train.all()
        orders = (epoch_order(len(y), seed, index, epoch, x.device) for epoch in range(epochs))
        method_arguments = (memory,) if method == "er" else ()
        losses = getattr(hand, method)(model, x, y, orders, clock.advance, *method_arguments)
        wall, cpu = clock.take(skip=-(-len(y) // hand.BATCH))
        samples.wall.append(wall)
        samples.cpu.append(cpu)
        tail = (len(losses) - 1) % LoopSettings.log_every + 1
        samples.losses.append(torch.stack(losses[-tail:]).mean().item())
        samples.accuracies = hand.accuracies(model, test_x, test_y, sets, 512)
        yield samples


def seed_and_stream(model: str, method: str, epochs: int, seed: int) -> Any:
    """The stream of a configuration, with torch seeded as clplat seeds it before it builds a model."""
    from clplat.run.build import build_stream, seed_everything

    stream = build_stream(config(model, method, epochs, seed, Path("unused")))
    seed_everything(seed)
    return stream


def config(model: str, method: str, epochs: int, seed: int, output: Path) -> Any:
    """The same work as a configuration."""
    from clplat.config.resolve import resolve

    return resolve(
        strategy={"name": method, "lr": hand.LR},
        stream="digits",
        backbone=model,
        head="linear",
        seed=seed,
        output=str(output),
        loop={"max_epochs": epochs, "batch_size": hand.BATCH, "checkpoint_seconds": None},
        tracking={"enabled": False},
        fabric={"accelerator": "cpu", "threads": 1},
    )


def make_runner(model: str, method: str, epochs: int, seed: int, run_dir: Path) -> tuple[Any, Clock]:
    """A runner that writes to `run_dir`, and the clock it tells of every step."""
    from clplat.run.build import build_strategy, build_stream, new_record
    from clplat.run.launch import make_fabric
    from clplat.run.loop import Runner
    from clplat.run.runlog import RunLog

    cfg, clock = config(model, method, epochs, seed, run_dir), Clock()
    stream = build_stream(cfg)
    strategy = build_strategy(cfg, stream.input_shape, stream.num_classes, seed=seed)
    fabric = make_fabric(cfg.fabric)
    fabric.launch()
    log: Any = RunLog(run_dir, time.perf_counter(), clock)  # type: ignore[arg-type]
    return Runner(strategy, stream, cfg.loop, fabric, seed, log, new_record(stream)), clock


def compare(model: str, method: str, seeds: int, epochs: int) -> tuple[list[Samples], list[Samples]]:
    """Both sides, experience by experience in turn, for each seed."""
    pairs = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            a, b = ours(model, method, epochs, seed, Path(folder)), theirs(model, method, epochs, seed)
            pair = (Samples(), Samples())
            for index in range(hand.EXPERIENCES):
                # Who comes first alternates, so that a drift of the machine's speed falls on both.
                if (index + seed) % 2:
                    second, first = next(b), next(a)
                else:
                    first, second = next(a), next(b)
                pair = (first, second)
            a.close()
            pairs.append(pair)
    return [p[0] for p in pairs], [p[1] for p in pairs]


def pooled(side: list[Samples], key: str) -> list[float]:
    """One quantity of all seeds and experiences."""
    return [value for samples in side for value in getattr(samples, key)]


def rows(quick: bool = False) -> list[Row]:
    """One row for each model and method."""
    found = []
    for model, method, limit in (("mlp", "naive", 1.1), ("mlp", "er", 1.1), ("vit_tiny", "naive", 1.05)):
        if quick and model == "vit_tiny":
            continue
        mine, base = compare(model, method, seeds=1 if quick else SEEDS[model], epochs=2 if quick else EPOCHS[model])
        wall = paired("", "ms", pooled(mine, "wall"), pooled(base, "wall"), "ratio")
        gap = max(abs(a - b) for a, b in zip(pooled(mine, "losses"), pooled(base, "losses"), strict=True))
        means = [statistics.mean(pooled(side, "accuracies")) for side in (mine, base)]
        note = f"on the wall {wall.median:.3f}; final accuracy {means[0]:.3f} and {means[1]:.3f}"
        note += f"; largest difference in loss {gap:.1e}" if method == "naive" else ""
        name = f"step, {model}, {method}"
        found.append(paired(name, "ms", pooled(mine, "cpu"), pooled(base, "cpu"), "ratio", limit, note))
    return found
