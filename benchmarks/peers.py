"""Avalanche's own training loop on the same work: steps next to the hand-written loop's, and the first step.

Each experience is trained once by Avalanche and once by hand, in turn. `python -m benchmarks.peers` in a fresh process
says when Avalanche's first step was done. Mammoth can't be installed next to it and is not measured here.
"""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks.timing import Row, paired


def avalanche_training(method: str, epochs: int, clock: Any, experiences: list[tuple[Any, Any]]) -> Any:
    """Train on each experience's (inputs, labels) in turn; yields after each."""
    import torch
    from avalanche.benchmarks import tensors_benchmark
    from avalanche.core import SupervisedPlugin
    from avalanche.training import Naive
    from avalanche.training.plugins import EvaluationPlugin, ReplayPlugin
    from avalanche.training.storage_policy import ReservoirSamplingBuffer

    from benchmarks import hand

    class Ticks(SupervisedPlugin):
        def after_training_iteration(self, strategy: Any, **kwargs: Any) -> None:
            clock.advance(0)

    plugins: list[Any] = [Ticks()]
    if method == "er":
        plugins.append(
            ReplayPlugin(hand.SLOTS, hand.BATCH, hand.REPLAY, storage_policy=ReservoirSamplingBuffer(hand.SLOTS))
        )
    benchmark = tensors_benchmark(experiences, experiences[:1], task_labels=[0] * len(experiences))
    model = hand.mlp()
    strategy = Naive(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=hand.LR),
        criterion=torch.nn.CrossEntropyLoss(),
        train_mb_size=hand.BATCH,
        train_epochs=epochs,
        plugins=plugins,
        evaluator=EvaluationPlugin(),
    )
    for experience in benchmark.train_stream:
        strategy.train(experience, num_workers=0)
        yield model


def rows(quick: bool = False) -> list[Row]:
    """Steps for naive and ER, and the first step; for information, so without limits."""
    import sys

    from benchmarks.startup import first_step, hand_command

    found = [_steps(method, quick) for method in ("naive", "er")]
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.peers"]
    first_step(command)
    pairs = [(first_step(command), first_step(hand_command("mlp", "naive", 0))) for _ in range(1 if quick else 5)]
    mine, base = zip(*pairs, strict=True)
    return [*found, paired("Avalanche: first step, mlp", "s", mine, base, "difference")]


def _steps(method: str, quick: bool) -> Row:
    from benchmarks import hand
    from benchmarks.steps import Clock, seed_and_stream, theirs

    epochs, seeds = (2, 1) if quick else (10, 3)
    mine, base = [], []
    for seed in range(seeds):
        stream = seed_and_stream("mlp", method, epochs, seed)
        experiences = [e.train.all() for e in stream]
        clock, by_hand = Clock(), theirs("mlp", method, epochs, seed)
        trained = avalanche_training(method, epochs, clock, experiences)
        for index, (_, labels) in enumerate(experiences):
            next(trained)
            mine.append(clock.take(skip=-(-len(labels) // hand.BATCH))[0])
            base.append(next(by_hand).wall[index])
    return paired(f"Avalanche: step, mlp, {method}", "ms", mine, base, "ratio")


class _FirstStep:
    def advance(self, step: int) -> None:
        os.write(1, f"{time.monotonic()}\n".encode())
        os._exit(0)


def main() -> None:
    from benchmarks import hand

    x, y = hand.digits()
    for _ in avalanche_training("naive", 1, _FirstStep(), [(x[:300], y[:300])]):
        pass


if __name__ == "__main__":
    main()
