"""Evaluation of all test sets in one pass over their samples.

Shapes: T test sets (columns of the accuracy matrix), n samples of all of them, B of a batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from clplat.errors import DivergedError, UserError
from clplat.strategy import Strategy, evaluating
from clplat.stream import Data, Stream


@dataclass
class _Group:
    """Test sets that can share a batch: same tensors, same world, same task where it matters."""

    data: Data
    columns: Tensor  # (n,) test set of each sample
    task: int | None
    features: dict[int, Tensor] = field(default_factory=dict)  # of this process's batches, where they never change

    def asks(self, positions: Tensor, asked: range | None) -> bool:
        """Whether any of the samples at `positions` (B,) is of a test set that is asked for; None asks for all."""
        return asked is None or any(j in asked for j in self.columns[positions].unique().tolist())


class Stopped(Exception):
    """An evaluation was left in the middle, as asked."""


class Evaluator:
    """Scores a strategy on every test set of a stream.

    Where the strategy declares `frozen_features`, the backbone is run once for each test sample, when first
    scored; its features are kept on `device`, n · D numbers, and later evaluations call `readout` on them.

    Args:
        stream: gives data, preparation and score.
        device: where predictions are made.
        batch_size: samples per batch, unless the strategy has an `evaluation_batch`.
        valid: score the validation parts instead of the test parts.
        limit: samples per test set at most, evenly spaced; None takes all.
        rank, world_size: this process's share of the batches.
    """

    def __init__(
        self,
        stream: Stream,
        *,
        device: torch.device,
        batch_size: int,
        valid: bool = False,
        limit: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.stream, self.device, self.batch_size = stream, device, batch_size
        self.rank, self.world_size = rank, world_size
        self.groups = list(_groups(stream, valid, limit))
        self.strategy: Strategy | None = None
        counts = torch.zeros(len(stream), dtype=torch.float64)
        self._group_of: dict[int, int] = {}  # of a test set, whose samples are all in one
        for number, group in enumerate(self.groups):
            weights = stream.weights(group.data.targets()).double()
            counts.index_add_(0, group.columns.cpu(), weights.cpu())
            self._group_of |= dict.fromkeys(group.columns.unique().tolist(), number)
        self.counts: list[float] = counts.tolist()

    @torch.no_grad()
    def __call__(
        self, strategy: Strategy, asked: range | None = None, leave_off: Callable[[int, int], bool] = lambda *_: False
    ) -> list[float | None]:
        """Score in [0, 1] on each test set; None where an experience has none. Leaves all modes as they were.

        Args:
            asked: test sets to score; the others are None, too. Batches are cut as for all of them, so that what is
                scored does not depend on what is not; those that hold none of its samples are left out.
            leave_off: asked before each batch, with how many samples of this process are scored, and are to be.

        Raises:
            Stopped: `leave_off` said so.
            DivergedError: outputs are NaN or infinite; on all processes. (−∞ is a class that is out of the question.)
        """
        totals = torch.zeros(len(self.stream) + 1, dtype=torch.float64, device=self.device)  # last: not finite
        if self.strategy is not strategy:  # features kept are those of one strategy
            self.strategy = strategy
            for group in self.groups:
                group.features.clear()
        size = strategy.evaluation_batch or self.batch_size
        chosen = [(group, self._batches(group, size, asked)) for group in self._asked(asked)]
        total, done = sum(len(positions) for _, wanted in chosen for _, positions in wanted), 0
        with evaluating(strategy):
            for group, wanted in chosen:
                coming = group.data.ahead(p for k, p in wanted if k not in group.features)
                for number, positions in wanted:
                    if leave_off(done, total):
                        raise Stopped
                    done += len(positions)
                    data = coming.subset(positions)
                    logits = self._logits(strategy, group, number, data)
                    totals[-1] += not_finite(logits)
                    logits = self.stream.among(logits, group.task)
                    scores = _score(self.stream, logits, data.targets().to(self.device))
                    totals.index_add_(0, group.columns[positions].to(self.device), scores.double())
        if self.world_size > 1:
            torch.distributed.all_reduce(totals)
        *sums, broken = totals.tolist()
        if broken:
            total = sum(len(group.data) for group in self.groups)
            raise DivergedError(f"outputs are NaN or infinite for {int(broken)} of {total} test samples")
        found: list[float | None] = [None] * len(sums)
        for j in range(len(sums)) if asked is None else asked:
            if self.counts[j]:
                found[j] = self.stream.pooled(sums[j] / self.counts[j])
        return found

    def _batches(self, group: _Group, size: int, asked: range | None) -> list[tuple[int, Tensor]]:
        """Number and positions (B,) of each batch of this process that holds samples of test sets `asked`."""
        every = torch.arange(len(group.data), device=group.columns.device).split(size)
        own = enumerate(every[self.rank :: self.world_size])
        return [(k, positions) for k, positions in own if group.asks(positions, asked)]

    def _asked(self, asked: range | None) -> list[_Group]:
        """Groups that hold any of the test sets `asked`, in order; found from these, which may be few of many."""
        if asked is None:
            return self.groups
        return [self.groups[number] for number in sorted({self._group_of[j] for j in asked if j in self._group_of})]

    def _logits(self, strategy: Strategy, group: _Group, number: int, data: Data) -> Tensor:
        """Logits (B, C) of this process's batch `number` of a group."""
        # The task id is not passed at all unless the stream declares it known.
        task = () if group.task is None else (group.task,)
        if not strategy.frozen_features:
            return strategy.predict(self._inputs(data), *task)
        if number not in group.features:
            group.features[number] = strategy.model.features(self._inputs(data))  # type: ignore[operator]
        return strategy.readout(group.features[number], *task)

    def _inputs(self, data: Data) -> Tensor:
        return self.stream.prepare(data.all()[0].to(self.device), False)


def not_finite(outputs: Tensor) -> Tensor:
    """How many of the predictions (B, ...) hold a NaN or +∞, which no score can be made of; a tensor of no axes."""
    if not outputs.is_floating_point() or not outputs.numel():
        return torch.zeros((), device=outputs.device)
    return (~(outputs < torch.inf)).flatten(1).any(1).sum()


def _score(stream: Stream, logits: Tensor, labels: Tensor) -> Tensor:
    """A head that knows no class yet has no rows and predicts nothing, so nothing is right."""
    if logits.ndim == 2 and logits.shape[1] == 0:
        return torch.zeros(len(labels), device=logits.device)
    return stream.score(logits, labels)


def _groups(stream: Stream, valid: bool, limit: int | None) -> Iterator[_Group]:
    """Gather the test sets by what they share, keeping order; rows of one group are concatenated."""
    found: dict[tuple[int, int, int, int | None], list[tuple[int, Data]]] = {}
    for experience in stream:
        data = experience.valid if valid else experience.test
        if data is None or len(data) == 0:
            continue
        if limit is not None and limit < len(data):
            data = data.subset(torch.linspace(0, len(data) - 1, limit, device=data.inputs.device).long())
        task = experience.task if stream.task_known else None
        found.setdefault((id(data.inputs), id(data.labels), id(data.world), task), []).append((experience.index, data))
    for (*_, task), members in found.items():
        first, device = members[0][1], members[0][1].inputs.device
        rows = [torch.arange(len(d), device=device) if d.rows is None else d.rows for _, d in members]
        columns = [torch.full((len(d),), column, device=device) for column, d in members]
        data = dataclasses.replace(first, rows=torch.cat(rows))  # of the same class, which may make or read its inputs
        yield _Group(data, torch.cat(columns), task)


@torch.no_grad()
def renew_means(strategy: Strategy, data: Data | None, batch_size: int) -> None:
    """Give a head of class means the features of `data`, in one pass; each process makes it whole.

    They are taken from what `predict` hands to the head: a strategy may predict with other weights than it trains.

    Raises:
        UserError: it does not predict by one pass through its model's head.
    """
    assert data is not None
    model: Any = strategy.model
    head, found = model.head, list[Tensor]()
    head.renew(data.targets().unique())
    decide = head.predict

    def noting(features: Tensor, task: int | None = None) -> Tensor:
        found.append(features)
        return decide(features, task)

    head.predict = noting
    try:
        with evaluating(strategy):
            parts = torch.arange(len(data), device=data.inputs.device).split(batch_size)
            coming = data.ahead(parts)
            for positions in parts:
                raw, labels = coming.batch(positions)[0], data.targets()[positions]
                strategy.predict(strategy.prepare(raw))
                if [len(features) for features in found] != [len(labels)]:
                    name = type(strategy).__name__
                    raise UserError(f"head: has class means, but {name} predicts past it, or by more than one pass")
                head.update(found.pop(), labels)
    finally:
        del head.predict
