"""Memories let go of what a request erases, keep the rest, and go on as samples of what is left."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clplat import Data, Experience, Kind
from clplat.components.memory import Archive, ClassBalanced, Greedy, Reservoir

N, CLASSES = 60, 4
INPUTS = torch.arange(1.0, N + 1)[:, None].repeat(1, 2)  # a sample is its number from 1, so that 0 is nobody
LABELS = torch.arange(N) % CLASSES
MAKE = [lambda: Reservoir(12, 0), lambda: ClassBalanced(12, 0), lambda: Greedy(12, 0), Archive]
IDS = ["reservoir", "balanced", "greedy", "archive"]


def part(rows, world=None):
    return Data(INPUTS, LABELS, torch.as_tensor(rows, dtype=torch.int64), world)


def request(rows=None, classes=(), world=None):
    if rows is None:
        rows = [i for i in range(N) if i % CLASSES in classes]
    return Experience(0, "forget-0", Kind.FORGET, part(rows, world), classes=tuple(classes))


def held(memory):
    """Rows held, in order."""
    return (memory.data().inputs[:, 0] - 1).long().tolist() if len(memory) else []


def everywhere(memory):
    """Rows that are in any slot of the memory, held or not."""
    return set((memory.stored["inputs"].unique() - 1).long().tolist()) - {-1}


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("fill"), st.sets(st.integers(0, N - 1), max_size=30)),
        st.tuples(st.just("samples"), st.sets(st.integers(0, N - 1), min_size=1, max_size=30)),
        st.tuples(st.just("classes"), st.sets(st.integers(0, CLASSES - 1), min_size=1, max_size=2)),
    ),
    max_size=8,
)


@pytest.mark.parametrize("make", MAKE, ids=IDS)
@given(operations=OPERATIONS)
@settings(max_examples=60, deadline=None)
def test_any_sequence_of_learning_and_erasing(make, operations):
    memory, active, met = make(), set(), False
    for what, chosen in operations:
        before = held(memory)
        if what == "fill":
            memory.fill(part(sorted(chosen)))
            active, met = active | chosen, met or bool(chosen)
        else:
            e = request(sorted(chosen)) if what == "samples" else request(classes=sorted(chosen))
            gone = chosen if what == "samples" else {i for i in range(N) if i % CLASSES in chosen}
            removed = memory.erase(e)
            active -= gone
            assert removed == sum(i in gone for i in before)
            assert held(memory) == [i for i in before if i not in gone] or isinstance(memory, ClassBalanced)
            assert sorted(held(memory)) == sorted(i for i in before if i not in gone)
            if met:
                assert everywhere(memory) == set(held(memory))  # nothing of the erased in any slot
        assert set(held(memory)) <= active
        assert len(memory) == len(held(memory))
        if len(memory):
            assert memory.data().labels.tolist() == [i % CLASSES for i in held(memory)]
            drawn, labels, rows = memory.sample(20) if not isinstance(memory, Archive) else memory.stored.values()
            assert torch.equal((drawn[:, 0] - 1).long(), rows)
            assert torch.equal(labels, rows % CLASSES)
        if isinstance(memory, Archive):
            assert set(held(memory)) == active
        else:
            assert len(memory) <= 12


@pytest.mark.parametrize("make", MAKE[:3], ids=IDS[:3])
@given(operations=OPERATIONS, cut=st.integers(0, 8))
@settings(max_examples=40, deadline=None)
def test_a_memory_restored_after_erasures_goes_on_bit_for_bit(make, operations, cut):
    def apply(memory, some):
        for what, chosen in some:
            if what == "fill":
                memory.fill(part(sorted(chosen)))
            else:
                memory.erase(request(sorted(chosen)) if what == "samples" else request(classes=sorted(chosen)))
        return memory

    memory = apply(make(), operations[:cut])
    other = type(memory)(12, 99)
    other.load_state_dict(copy.deepcopy(memory.state_dict()), strict=True)
    for m in (memory, other):
        apply(m, operations[cut:])
    assert held(memory) == held(other)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in memory.state_dict().items())


def test_a_reservoir_stays_uniform_over_what_is_left_and_what_comes():
    """Random pairing: 40 samples, 10 slots; 20 are erased, 15 new ones come: each of 35 is held equally often."""
    trials, counts = 3000, torch.zeros(N)
    for seed in range(trials):
        memory = Reservoir(10, seed)
        memory.fill(part(range(40)))
        memory.erase(request(range(0, 40, 2)))
        memory.fill(part(range(40, 55)))
        counts[held(memory)] += 1
    left = [*range(1, 40, 2), *range(40, 55)]
    assert counts[0:40:2].sum() == 0
    share = counts[left] / counts.sum()
    assert (share - 1 / 35).abs().max() < 5 * (1 / 35 / counts.sum().item()) ** 0.5
    # 20 of 40 were erased, so about 5 of 10 slots are free, and 15 of 20 places are taken again.
    assert counts.sum() / trials == pytest.approx(10 * 35 / 40, abs=0.3)


def test_a_reservoir_that_was_not_full_fills_up_as_if_the_erased_had_never_come():
    memory, other = Reservoir(10, 0), Reservoir(10, 0)
    memory.fill(part(range(8)))
    memory.erase(request([0, 5]))
    other.fill(part([1, 2, 3, 4, 6, 7]))
    for m in (memory, other):
        m.fill(part(range(20, 40)))
    assert held(memory) == held(other)


def test_room_of_an_erased_class_goes_to_the_others():
    memory = ClassBalanced(12, 0)
    memory.fill(part(range(40)))
    assert memory.quota == 3
    memory.erase(request(classes=[0, 1]))
    assert (memory.quota, len(memory)) == (6, 6)
    memory.fill(part(range(40, 60)))
    labels = memory.data().labels
    assert torch.bincount(labels).tolist() == [3, 3, 3, 3]  # 0 and 1 are learned anew, and have their room again
    assert memory.quota == 3


@pytest.mark.parametrize("make", MAKE, ids=IDS)
def test_the_same_row_in_another_guise_is_another_sample(make):
    def turned(x):
        return -x

    memory = make()
    memory.fill(part([0, 1]))
    memory.fill(part([0, 1], turned))
    assert memory.erase(request([1], world=turned)) == 1
    assert sorted(memory.data().inputs[:, 0].tolist()) == [-1.0, 1.0, 2.0]


def test_rounding_of_a_world_does_not_hide_a_sample():
    memory = Archive()
    memory.fill(part([3], lambda x: x * (1 / 3)))
    assert memory.erase(request([3], world=lambda x: x / 3)) == 1
    bytes_ = Data((INPUTS * 4).to(torch.uint8), LABELS, torch.tensor([7]))
    memory = Archive()
    memory.fill(bytes_)
    off = Experience(0, "f", Kind.FORGET, Data(bytes_.inputs, LABELS, torch.tensor([7]), lambda x: x + 1))
    assert memory.erase(off) == 1


@pytest.mark.parametrize("make", MAKE, ids=IDS)
def test_samples_without_rows_can_be_erased_by_class_only(make):
    memory = make()
    add = memory.extend if isinstance(memory, Archive) else memory.add
    add(INPUTS[:8], LABELS[:8])
    assert memory.erase(request(classes=[2])) == 2
    with pytest.raises(ValueError, match="can't tell samples apart"):
        memory.erase(request([0]))
    assert len(memory) == 6


@pytest.mark.parametrize("make", MAKE, ids=IDS)
def test_erasing_from_an_empty_memory_and_erasing_everything(make):
    memory = make()
    assert memory.erase(request([0])) == 0
    memory.fill(part(range(5)))
    assert memory.erase(request(range(5))) == 5
    assert len(memory) == 0
    assert len(memory.data()) == 0
    memory.fill(part([9]))
    assert held(memory) == [9]
