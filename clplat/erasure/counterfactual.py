"""The stream that would have been, had erased data never been asked to be learned: what a model trained from scratch
on the retained data has seen, and so the reference of unlearning.

Source: the event streams of Liu, Liu, Stone, "Continual Learning and Private Unlearning", CoLLAs 2022,
arXiv:2203.12817: events up to request t, with every erased pair of LEARN and FORGET deleted.

Shapes: N samples of a data set, n of an experience.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from clplat.erasure.ledger import same_source
from clplat.stream import Data, Experience, Kind, Stream


def counterfactual(stream: Stream, index: int) -> Stream:
    """The stream up to and including experience `index`, without requests and without what they erased.

    A learn experience loses the samples that a later request erases (all of a class erased as a whole) and the test
    samples that the request is scored on, and is left out where no sample remains. What is learned anew after a request
    stays. Names stay as they are, indices are counted anew; tensors are shared.

    Args:
        stream: of any kinds.
        index: of the request (or any experience) up to which requests count.
    """
    until = list(stream)[: index + 1]
    kept: list[Experience] = []
    for position, e in enumerate(until):
        if e.kind is Kind.FORGET:
            continue
        later = [r for r in until[position + 1 :] if r.kind is Kind.FORGET]
        if e.kind is Kind.LEARN and later:
            e = _without(e, later)
            if e.train is None or not len(e.train):
                continue
        kept.append(dataclasses.replace(e, index=len(kept)))
    found = copy.copy(stream)
    found.experiences = tuple(kept)
    return found


def _without(e: Experience, requests: Sequence[Experience]) -> Experience:
    """A learn experience less what `requests` erase."""
    gone = {c for r in requests for c in r.classes}
    train = _less(e.train, [r.train for r in requests], gone)
    test, valid = (_less(getattr(e, p), [getattr(r, p) for r in requests], gone) for p in ("test", "valid"))
    left = set(e.classes) - gone
    if train is not None and train.labels is not None:
        left &= set(train.targets().unique().tolist())
    return dataclasses.replace(e, train=train, test=test or None, valid=valid or None, classes=tuple(sorted(left)))


def _less(data: Data | None, erased: Sequence[Data | None], classes: set[int]) -> Data | None:
    if data is None:
        return None
    rows = data.row_ids()
    stays: Tensor = torch.ones(len(rows), dtype=torch.bool, device=rows.device)
    for part in erased:
        if part is not None and same_source(part, data):
            stays &= ~torch.isin(rows, part.row_ids().to(rows.device))
    if classes and data.labels is not None:
        stays &= ~torch.isin(data.targets(), torch.tensor(sorted(classes), device=rows.device))
    return dataclasses.replace(data, rows=rows[stays])
