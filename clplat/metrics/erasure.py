"""Which test samples a request takes from those learned before it: by rows of the data set, not by class."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from clplat.stream import Data, Experience, Kind


def erased_samples(experiences: Sequence[Experience], index: int, part: str = "test") -> tuple[tuple[int, int], ...]:
    """(index of an earlier learn experience, number of its held-out samples in this one's) for each that shares any.

    Two data sets share a sample when both hold the same row of the same tensor through the same `world`. A request for
    training samples, whose held-out set is made of them, takes away no test sample and gives ().

    Args:
        experiences: of the whole stream, in order.
        index: of the request; any other kind gives ().
        part: "test" or "valid", the data that evaluation runs on.
    """
    request = experiences[index]
    data = getattr(request, part)
    if request.kind is not Kind.FORGET or data is None:
        return ()
    shared = [
        (e.index, _shared(data, getattr(e, part)))
        for e in experiences[:index]
        if e.kind is Kind.LEARN and getattr(e, part) is not None
    ]
    return tuple((j, n) for j, n in shared if n)


def _shared(one: Data, other: Data) -> int:
    """Number of samples of `one` that `other` holds too."""
    if one.inputs is not other.inputs or one.world is not other.world:
        return 0
    rows = torch.arange(len(one)) if one.rows is None else one.rows
    others = torch.arange(len(other)) if other.rows is None else other.rows
    return int(torch.isin(rows.cpu(), others.cpu()).sum())
