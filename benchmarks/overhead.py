"""Every strategy that learns, in clplat's loop and in the barest one: what of a step is the platform's.

ViT-tiny with 2 blocks and random weights on digits, batches of 32; both sides are the same strategy with small options,
from the same weights and draws, on the same batches, and end with the same losses (a choice among nearly equal weights,
as LIFT's, may fall otherwise by rounding). What the method itself computes is on both sides (`arithmetic` writes that
out by hand); here stands what hooks, batches, checks, counts and logs add.
"""

from __future__ import annotations

import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from benchmarks.in_turn import Meter, Ours, Work
from benchmarks.timing import Row, paired
from clplat.errors import UserError

CLASSES, BATCH, RATE, LIMIT = 10, 32, 1e-4, 1 / 0.95
NEEDLESS = ("joint", "retrain")  # what they keep is all data: a turn is longer than the one before


class Steps(Meter):
    """Of turns whose length is not known beforehand: a memory may add to the data."""

    def advance(self, step: int = 0) -> None:
        self.taken, self.now = self.taken + 1, self.read()
        if self.taken == self.skip:
            self.started = self.now

    def finish(self) -> None:
        if self.taken <= self.skip:
            raise UserError(f"a turn of {self.taken} steps")
        self.spent.append((self.now - self.started) / (self.taken - self.skip))
        self.taken = 0


class Bare:
    """A strategy's hooks in their order, and nothing else."""

    def __init__(self, strategy: Any, work: Work) -> None:
        self.strategy, self.work, self.meter = strategy, work, Steps(work)

    def turn(self, number: int) -> None:
        from clplat import Data, Experience, Kind
        from clplat.components.memory import Bounded
        from clplat.data.batches import epoch_order
        from clplat.run.schedule import rate_factor

        torch.manual_seed(number)
        strategy, losses = self.strategy, list[Tensor]()
        experience = Experience(number, f"turn-{number}", Kind.LEARN, Data(*self.work.data), classes=(*range(CLASSES),))
        strategy.train()
        strategy.grow(experience)
        strategy.begin(experience)
        trained = any(p.requires_grad for p in strategy.parameters())
        optimizer = strategy.configure_optimizers() if trained else None
        data = strategy.training_data(experience)
        for memory in (m for m in strategy.modules() if isinstance(m, Bounded)):
            memory.open = True
        batches = epoch_order(len(data), 0, number, 0, self.work.device).split(self.work.batch)
        rates = [] if optimizer is None else [group["lr"] for group in optimizer.param_groups]
        for index, rows in enumerate(batches):
            strategy.raw, y = data.batch(rows)
            strategy.rows, strategy.global_batch = data.row_ids()[rows], len(rows)
            loss = strategy.training_step((strategy.raw, y), index)
            if loss is not None and optimizer is not None:
                loss.backward()
                losses.append(loss.detach())
                strategy.on_after_backward()
                factor = rate_factor(index, len(batches), strategy.schedule, strategy.warmup)
                for group, rate in zip(optimizer.param_groups, rates, strict=True):
                    group["lr"] = rate * factor
                strategy.on_before_optimizer_step(optimizer)
                optimizer.step()
                optimizer.zero_grad()
                strategy.after_step()
            self.meter.advance()
        strategy.end(experience)
        self.meter.losses += [torch.stack(losses).mean().item()] if losses else []


def sides(name: str, depth: int, work: Work) -> tuple[Ours, Bare]:
    """Both of them. Raises UserError where the strategy needs another network."""
    from clplat.backbones.heads import Growing
    from clplat.backbones.vit import vit_tiny
    from clplat.testing import Subject

    subject, built = Subject(name), []
    for _ in range(2):
        torch.manual_seed(0)
        backbone = vit_tiny((1, 8, 8), depth=depth)
        model = backbone.assemble(Growing(backbone.embed_dim, CLASSES), None)
        options = subject.options()
        built.append(subject.cls(model=model, **options | ({"lr": RATE} if "lr" in options else {})))
    ours = Ours(built[0], work)
    ours.meter = Steps(work)
    ours.runner.log.display = ours.meter  # type: ignore[assignment]
    return ours, Bare(built[1], work)


def ratios(name: str, depth: int, work: Work) -> tuple[list[float], float]:
    """Of the time of a step, turn by turn; and the largest difference of a turn's mean loss."""
    ours, bare = sides(name, depth, work)
    for number in range(work.rounds + 1):
        for side in (ours, bare) if number % 2 else (bare, ours):
            side.turn(number)
            side.meter.finish()
    gap = max((abs(a - b) for a, b in zip(ours.meter.losses, bare.meter.losses, strict=True)), default=0.0)
    return [a / b for a, b in zip(ours.meter.spent[1:], bare.meter.spent[1:], strict=True)], gap


def rows(quick: bool = False) -> list[Row]:
    """One row over all strategies; `quick` takes three of them."""
    from benchmarks.hand import digits
    from clplat import Kind
    from clplat.config import discovery

    x, y = digits()
    size = 64 if quick else 256
    names = [n for n, e in discovery.entries("strategies").items() if e.qualname.startswith("clplat.")]
    found, others, gaps = dict[str, float](), list[str](), dict[str, float]()
    for name in ("naive", "er", "acil") if quick else sorted(set(names) - set(NEEDLESS)):
        cls = discovery.load("strategies", name)
        if Kind.LEARN not in cls.kinds:
            continue
        if cls.needs_text:
            others.append(name)
            continue
        work = Work((x[:size], y[:size]), CLASSES, BATCH, torch.device("cpu"), rounds=2 if quick else 3)
        try:
            pairs, gap = ratios(name, 1 if quick else 2, work)
        except UserError:
            others.append(name)
            continue
        found[name] = statistics.median(pairs)
        gaps[name] = gap
        print(f"{name}: {found[name]:.3f}, difference in loss {gap:.1e}", file=sys.stderr, flush=True)
    most = sorted(found, key=lambda n: -found[n])[:3]
    apart = ", ".join(f"{n} {gap:.1e}" for n, gap in gaps.items() if gap) or "none"
    note = "most: " + ", ".join(f"{n} {found[n]:.3f}" for n in most) + f"; differences in loss: {apart}"
    note += f"; not on this network, or by one step alone: {', '.join(others)}" if others else ""
    values = list(found.values())
    row = paired(f"step of {len(found)} strategies, each in the barest loop", "ratio", values, [1.0] * len(values),
                 "ratio", None if quick else LIMIT, note)  # fmt: skip
    return [row]
