"""Evaluation of five experiences' test sets: clplat's evaluator next to one hand-written loop over all samples."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import torch

from benchmarks import hand
from benchmarks.steps import make_runner
from benchmarks.timing import Row, paired

# Evaluations in one measurement: some tens of milliseconds.
REPEATS = {"mlp": 20, "vit_tiny": 1}
LIMITS = {"mlp": 1.25, "vit_tiny": 1.05}  # those of a step


def rows(quick: bool = False) -> list[Row]:
    """One row for each model."""
    found = []
    for model in ("mlp", "vit_tiny"):
        with tempfile.TemporaryDirectory() as folder:
            runner, _ = make_runner(model, "naive", 1, 0, Path(folder))
        tests = [e.test.all() for e in runner.stream]
        x, y = (torch.cat(parts) for parts in zip(*tests, strict=True))
        sets = torch.repeat_interleave(torch.tensor([len(labels) for _, labels in tests]))
        mine, base = [], []
        for _ in range(2 if quick else 21 if model == "mlp" else 7):
            started = time.perf_counter()
            for _ in range(REPEATS[model]):
                scores = runner.evaluate(runner.strategy)
            middle = time.perf_counter()
            for _ in range(REPEATS[model]):
                by_hand = hand.accuracies(runner.strategy.model, x, y, sets, runner.loop.eval_batch_size)
            mine.append(1000 * (middle - started) / REPEATS[model])
            base.append(1000 * (time.perf_counter() - middle) / REPEATS[model])
        assert all(abs(a - b) < 1e-6 for a, b in zip(scores, by_hand, strict=True))
        runner.log.close()
        note = f"{len(tests)} test sets, {len(x)} samples, equal accuracies"
        found.append(paired(f"evaluation, {model}", "ms", mine, base, "ratio", LIMITS[model], note))
    return found
