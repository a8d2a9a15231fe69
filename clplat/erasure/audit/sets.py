"""Which samples an audit of a request scores: what it erases, and what is learned and kept, to train on and to test.

The sets follow from the stream alone, as the draws from them do, so that two runs on one stream score the same samples
whatever their strategy and their seed of initialisation.

Shapes: N samples of a data set, n of a part.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from clplat.stream import Data, Experience, Kind

SETS = ("erased", "erased_test", "retained", "retained_test")


@dataclass(frozen=True, eq=False)
class Piece:
    """Samples of one data set.

    Args:
        data: the samples.
        task: that `predict` is told of them where the stream declares it known.
        source: index of the first experience that they come from.
    """

    data: Data
    task: int
    source: int


def sets_of(experiences: Sequence[Experience], index: int, held_out: str = "test") -> dict[str, list[Piece]]:
    """What an audit of the request at `index` scores, by name; a set that there is nothing of is empty.

    erased: the samples that the request names; erased_test: those held-out samples that go with them (a request for
    single samples, which erases no class, has none); retained and retained_test: what is learned before the request
    and erased neither by it nor before, unless it was taught again.

    Args:
        experiences: of the stream, in order.
        index: of a forget experience.
        held_out: "test" or "valid", the part that evaluation runs on.
    """
    kept: dict[str, list[Piece]] = {"train": [], held_out: []}
    for e in experiences[: index + 1]:
        for part, pool in kept.items():
            data = getattr(e, part)
            if e.kind is Kind.LEARN and data is not None:
                kept[part] = _with(pool, Piece(data, e.task, e.index))
            elif e.kind is Kind.FORGET:
                before, kept[part] = pool, _without(pool, e, data)
    request = experiences[index]
    named, tests = request.train, getattr(request, held_out)
    gone = tests is not None and _shared(before, tests)  # the pool of the last part: the held-out one
    return {
        "erased": [] if named is None else [Piece(named, request.task, index)],
        "erased_test": [Piece(tests, request.task, index)] if gone else [],
        "retained": kept["train"],
        "retained_test": kept[held_out],
    }


def draw(pieces: Sequence[Piece], most: int, seed: int) -> list[Piece]:
    """At most `most` samples of all pieces together, drawn without replacement, in the order of the pieces.

    Each sample has a random priority of its own, so that of two overlapping sets mostly the same samples are drawn:
    requests are compared over the same ones, and each is scored once.
    """
    pieces = [p for p in pieces if len(p.data)]
    sizes = [len(p.data) for p in pieces]
    if sum(sizes) <= most:
        return pieces
    chosen = torch.cat([_priorities(p, seed) for p in pieces]).argsort()[:most].sort().values
    drawn, start = [], 0
    for piece, size in zip(pieces, sizes, strict=True):
        positions = chosen[(chosen >= start) & (chosen < start + size)] - start
        if len(positions):
            drawn.append(replace(piece, data=piece.data.subset(positions.to(piece.data.inputs.device))))
        start += size
    return drawn


def _priorities(piece: Piece, seed: int) -> Tensor:
    """(n,) random number of each sample: of its row, in the guise of this piece."""
    generator = torch.Generator().manual_seed(seed + 1_000_003 * piece.source)
    return torch.rand(len(piece.data.inputs), generator=generator, dtype=torch.float64)[piece.data.row_ids().cpu()]


def _same(one: Data, other: Data) -> bool:
    return one.inputs is other.inputs and one.world is other.world


def _with(pool: list[Piece], piece: Piece) -> list[Piece]:
    """The pool with the samples of `piece`; a sample that it has already stays once."""
    for i, other in enumerate(pool):
        if _same(other.data, piece.data) and other.task == piece.task:
            rows = torch.cat([other.data.row_ids(), piece.data.row_ids()]).unique()
            return [*pool[:i], replace(other, data=replace(other.data, rows=rows)), *pool[i + 1 :]]
    return [*pool, piece]


def _without(pool: list[Piece], request: Experience, data: Data | None) -> list[Piece]:
    """The pool without the samples of `data` and without the classes that the request erases as a whole."""
    left = []
    for piece in pool:
        rows = piece.data.row_ids()
        gone = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        if data is not None and _same(piece.data, data):
            gone |= torch.isin(rows, data.row_ids())
        if request.classes and piece.data.labels is not None:
            gone |= torch.isin(piece.data.targets(), torch.tensor(request.classes, device=rows.device))
        if not gone.all():
            left.append(replace(piece, data=replace(piece.data, rows=rows[~gone])))
    return left


def _shared(pool: list[Piece], data: Data) -> bool:
    """Whether the pool holds a sample of `data`."""
    return any(_same(p.data, data) and bool(torch.isin(data.row_ids(), p.data.row_ids()).any()) for p in pool)
