"""A hypernetwork's training step next to one of its target trained directly, and its growth with the old tasks.

Split MNIST's configuration in hypercl: target 784-400-400-10 (478,410 weights), pieces of 42,000, hidden layers 10 and
10, batch 128, Adam. Both strategies take the same batch in turn, `STEPS` steps a time; times are the processor's, which
neighbours on a shared machine disturb least. `factors` is the default of `hnet`; the other two ways to hold old outputs
stand beside it for information.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.timing import Row, paired

BATCH, STEPS = 128, 4


def stepper(make: Callable[[Any], Any], tasks: int) -> Callable[[], float]:
    """Takes `STEPS` steps of a strategy that has met `tasks` tasks; returns milliseconds a step."""
    from clplat import Experience, Kind
    from clplat.backbones.base import Classifier
    from clplat.backbones.heads import Linear
    from clplat.backbones.mlp import mlp

    torch.manual_seed(0)
    strategy = make(Classifier(mlp((784,), [400, 400]), Linear(400, 10)))
    for task in range(tasks):
        experience = Experience(task, f"task {task}", Kind.LEARN, None, classes=tuple(range(10)), task=task)
        strategy.grow(experience)
        strategy.begin(experience)
    optimizer = strategy.configure_optimizers()
    x, y = torch.randn(BATCH, 784), torch.randint(0, 10, (BATCH,))
    strategy.raw, strategy.global_batch = x, BATCH

    def steps() -> float:
        started = time.process_time()
        for number in range(STEPS):
            strategy.training_step((x, y), number).backward()
            strategy.on_before_optimizer_step(optimizer)
            optimizer.step()
            optimizer.zero_grad()
            strategy.after_step()
        return 1000 * (time.process_time() - started) / STEPS

    return steps


def rows(quick: bool = False) -> list[Row]:
    """One row for each number of tasks and way of holding old outputs; the limit is on 10 tasks with the default."""
    from clplat.strategies.hnet import HNet
    from clplat.strategies.naive import Naive

    def hnet(**options: Any) -> Callable[[Any], Any]:
        sizes: dict[str, Any] = {"embedding": 96, "chunk": 42000, "chunk_embedding": 96, "hidden": [10, 10]}
        return lambda model: HNet(model=model, optimizer="adam", lr=0.001, **sizes, **options)

    cases: list[tuple[str, Callable[[Any], Any], int, float | None]] = [
        ("1 task", hnet(), 1, None),
        ("2 tasks", hnet(), 2, None),
        ("5 tasks", hnet(), 5, None),
        ("10 tasks", hnet(), 10, 3.0),
        ("10 tasks, lookahead", hnet(lookahead=True), 10, None),
        ("10 tasks, outputs stored", hnet(held_outputs="stored"), 10, None),
        ("10 tasks, outputs recomputed", hnet(held_outputs="recomputed"), 10, None),
    ]
    direct = stepper(lambda model: Naive(model=model, optimizer="adam", lr=0.001), 1)
    found = []
    for name, make, tasks, limit in cases:
        generated, ours, base = stepper(make, tasks), list[float](), list[float]()
        for round_ in range(2 if quick else 20):
            first, second = (direct, generated) if round_ % 2 else (generated, direct)
            times = first(), second()
            a, b = times[::-1] if round_ % 2 else times
            if round_ or quick:  # the first round sets up
                ours.append(a)
                base.append(b)
        found.append(paired(f"hypernetwork over its target, {name}", "ms", ours, base, "ratio", limit))
    return found
