import pytest
import torch

from clplat import Data
from clplat.components.herding import Herded, herd
from clplat.errors import UserError


def brute(features, count):
    """Algorithm 4 as it is written: the running mean of each candidate, in float64."""
    mean, chosen = features.mean(0), []
    for k in range(1, min(count, len(features)) + 1):
        free = [i for i in range(len(features)) if i not in chosen]
        gaps = [(mean - (features[i] + features[chosen].sum(0)) / k).norm() for i in free]
        chosen.append(free[int(torch.stack(gaps).argmin())])
    return chosen


def test_exemplars_are_those_of_the_algorithm_for_classes_of_any_size():
    features = [torch.randn(n, 4, dtype=torch.float64) for n in (11, 3, 7)]
    found = herd(features, 5)
    assert [row.tolist() for row in found] == [brute(f, 5) for f in features]


def data(labels, first=0):
    """Samples whose input is their row."""
    rows = torch.arange(first, first + len(labels))
    return Data(torch.cat([torch.zeros(first), rows]).double()[:, None], torch.tensor([0] * first + labels), rows)


def test_all_classes_have_an_equal_share_and_old_ones_keep_their_first():
    memory = Herded(7)
    memory.fill(data([0, 1] * 5), lambda x: torch.cat([x, x.square()], 1))
    assert torch.bincount(memory.stored["labels"]).tolist() == [3, 3]
    first = {c: memory.stored["rows"][memory.stored["labels"] == c].tolist() for c in (0, 1)}
    memory.fill(data([2] * 6, first=10), lambda x: x)
    assert torch.bincount(memory.stored["labels"]).tolist() == [2, 2, 2]
    for c in (0, 1):
        assert memory.stored["rows"][memory.stored["labels"] == c].tolist() == first[c][:2]
    assert torch.equal(memory.stored["inputs"][:, 0].long(), memory.stored["rows"])


def test_a_class_that_comes_again_is_chosen_from_its_exemplars_and_its_new_samples():
    memory = Herded(2)
    memory.fill(data([0] * 5), lambda x: x)  # of 0 … 4 the mean is 2, then 1 or 3
    before = memory.stored["rows"].tolist()
    memory.fill(data([0] * 2, first=100), lambda x: x)
    pool = torch.tensor([*before, 100, 101], dtype=torch.float64)[:, None]
    assert memory.stored["rows"].tolist() == pool[brute(pool, 2), 0].long().tolist()
    assert max(memory.stored["rows"].tolist()) >= 100


def test_no_room_for_a_class_is_refused():
    with pytest.raises(UserError, match=r"memory: 2 has no room for 3 classes \(valid: more\)"):
        Herded(2).fill(data([0, 1, 2]), lambda x: x)
