"""What a request takes away is found by rows, not by class."""

import torch

from clplat.metrics.erasure import erased_samples
from clplat.stream import Data, Experience, Kind

INPUTS, LABELS = torch.zeros(10, 2), torch.arange(10) % 3


def data(rows, **changes):
    return Data(**{"inputs": INPUTS, "labels": LABELS, "rows": None if rows is None else torch.tensor(rows), **changes})


def stream(*tests):
    kinds = [Kind.LEARN] * (len(tests) - 1) + [Kind.FORGET]
    return [Experience(i, f"e{i}", k, None, test=t) for i, (k, t) in enumerate(zip(kinds, tests, strict=True))]


def test_shared_rows():
    assert erased_samples(stream(data([0, 1, 2]), data([3, 4]), data([2, 3, 4])), 2) == ((0, 1), (1, 2))


def test_whole_tensors():
    assert erased_samples(stream(data(None), data([7])), 1) == ((0, 1),)
    assert erased_samples(stream(data([7]), data(None)), 1) == ((0, 1),)


def test_another_tensor_or_world_shares_nothing():
    assert erased_samples(stream(data([0, 1], inputs=INPUTS.clone()), data([0])), 1) == ()
    assert erased_samples(stream(data([0, 1], world=torch.flip), data([0])), 1) == ()
    assert erased_samples(stream(data([0, 1], world=torch.flip), data([0], world=torch.flip)), 1) == ((0, 1),)


def test_only_requests_and_only_what_came_before():
    parts = stream(data([0]), data([0]), data([0]))
    assert erased_samples(parts, 1) == ()
    request, later = parts[2], parts[1]
    assert erased_samples([parts[0], request, later], 1) == ((0, 1),)


def test_no_held_out_data():
    assert erased_samples(stream(data([0]), None), 1) == ()
    assert erased_samples(stream(None, data([0])), 1) == ()
    assert erased_samples(stream(data([0]), data([0])), 1, part="valid") == ()
