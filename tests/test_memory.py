"""Memories: who is kept, how often, and that a resumed or distributed memory is the same memory."""

import copy
import math

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from clplat.components.memory import Archive, ClassBalanced, Greedy, Reservoir
from clplat.errors import UserError

MEMORIES = [Reservoir, ClassBalanced, Greedy]


def stream(memory, numbers, batch, classes=3):
    """Offer samples whose input is their own number; the label is the number modulo `classes`."""
    for part in torch.as_tensor(numbers).split(batch):
        memory.add(part[:, None].double(), part % classes)
    return memory


def kept(memory):
    """Numbers of the held samples, in slot order."""
    if len(memory) == 0:
        return []
    slots = memory._slots(torch.arange(len(memory)))
    return memory.stored["inputs"][slots, 0].long().tolist()


@pytest.mark.parametrize("cls", MEMORIES)
@given(size=st.integers(3, 20), n=st.integers(0, 60), batch=st.integers(1, 25), seed=st.integers(0, 2**31))
@settings(max_examples=30, deadline=None)
def test_bounded_distinct_and_labelled(cls, size, n, batch, seed):
    memory = stream(cls(size, seed), torch.arange(n), batch)
    held = kept(memory)
    assert len(held) == len(memory) <= min(n, size)
    assert len(set(held)) == len(held)
    assert set(held) <= set(range(n))
    slots = memory._slots(torch.arange(len(memory)))
    if held:
        assert memory.stored["labels"][slots].tolist() == [x % 3 for x in held]


@pytest.mark.parametrize("batch", [1, 4, 7, 10])
def test_the_first_samples_are_all_kept_in_order(batch):
    assert kept(stream(Reservoir(10, 0), torch.arange(10), batch)) == list(range(10))


@given(size=st.integers(1, 12), lengths=st.lists(st.integers(0, 9), max_size=8), seed=st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_reservoir_equals_the_sequential_algorithm_on_the_same_draws(size, lengths, seed):
    memory, generator = Reservoir(size, seed), torch.Generator().manual_seed(seed)
    slots, seen = {}, 0
    for length in lengths:
        numbers = torch.arange(seen, seen + length)
        memory.add(numbers[:, None].double(), numbers)
        if seen + length > size:
            uniform = torch.rand(length, dtype=torch.float64, generator=generator).tolist()
        for k in range(length):
            i = seen + k  # algorithm R, one sample at a time
            slot = i if i < size else math.floor(uniform[k] * (i + 1))
            if slot < size:
                slots[slot] = i
        seen += length
    assert kept(memory) == [slots[s] for s in sorted(slots)]


def five_sigma(count, trials, p):
    return abs(count - trials * p) < 5 * math.sqrt(trials * p * (1 - p))


def test_reservoir_is_uniform_over_the_stream():
    n, size, trials = 40, 10, 2000
    counts = torch.zeros(n)
    for seed in range(trials):
        counts[kept(stream(Reservoir(size, seed), torch.arange(n), 7))] += 1
    assert all(five_sigma(c, trials, size / n) for c in counts.tolist())


def test_class_balanced_is_uniform_within_each_class_though_classes_come_late():
    # 30 of class 0, then 12 of class 1, then 6 of class 2; 9 slots: 3 each
    numbers = torch.cat([torch.arange(0, 90, 3), torch.arange(1, 37, 3), torch.arange(2, 20, 3)])
    trials, counts = 1500, torch.zeros(90)
    for seed in range(trials):
        memory = stream(ClassBalanced(9, seed), numbers, 8)
        held = kept(memory)
        assert [sum(x % 3 == c for x in held) for c in range(3)] == [3, 3, 3]
        counts[held] += 1
    for c, n in ((0, 30), (1, 12), (2, 6)):
        of_class = numbers[numbers % 3 == c]
        assert all(five_sigma(x, trials, 3 / n) for x in counts[of_class].tolist())


def test_class_balanced_has_no_room_for_more_classes_than_slots():
    with pytest.raises(UserError, match="no room for 3 classes"):
        stream(ClassBalanced(2, 0), torch.arange(6), 6)


@pytest.mark.parametrize("cls", MEMORIES)
def test_sampling_is_uniform_over_what_is_held(cls):
    memory = stream(cls(8, 0), torch.arange(7), 3)
    inputs, labels = memory.sample(7000)
    assert torch.equal(inputs[:, 0].long() % 3, labels)
    counts = torch.bincount(inputs[:, 0].long(), minlength=7).tolist()
    assert all(five_sigma(c, 7000, 1 / len(memory)) for c in counts if c)
    assert sum(c > 0 for c in counts) == len(memory)


@pytest.mark.parametrize("cls", MEMORIES)
def test_a_restored_memory_goes_on_bit_for_bit(cls):
    memory = stream(cls(10, 3), torch.arange(45), 8)
    state = copy.deepcopy(memory.state_dict())
    assert all(isinstance(v, torch.Tensor) for v in state.values())
    other = cls(10, 99)
    other.load_state_dict(state, strict=True)
    for m in (memory, other):
        stream(m, torch.arange(45, 80), 8, classes=5)
    assert kept(memory) == kept(other)
    assert all(torch.equal(a, b) for a, b in zip(memory.sample(50), other.sample(50), strict=True))
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in memory.state_dict().items())


@pytest.mark.parametrize("cls", MEMORIES)
def test_a_draw_without_replacement_is_uniform_and_holds_no_sample_twice(cls):
    memory = cls(12, seed=3)
    memory.add(torch.arange(40.0)[:, None], torch.arange(40) % 3)
    held = {float(v) for v in memory.sample_distinct(100)[0]}
    assert len(held) == len(memory) == 12  # all, where more are asked for
    counts = dict.fromkeys(held, 0)
    for _ in range(3000):
        inputs, labels = memory.sample_distinct(4)
        assert len(inputs.unique()) == 4
        assert torch.equal(labels, inputs[:, 0].long() % 3)
        for v in inputs[:, 0].tolist():
            counts[v] += 1
    assert all(abs(n - 1000) < 130 for n in counts.values())  # 5 standard deviations of a binomial of 3000 and 1/3


@pytest.mark.parametrize("cls", MEMORIES)
def test_an_empty_memory_round_trips_and_refuses_to_sample(cls):
    memory = cls(4, 0)
    memory.load_state_dict(cls(4, 1).state_dict(), strict=True)
    assert len(memory) == 0
    with pytest.raises(ValueError, match="empty"):
        memory.sample(1)


def test_a_state_that_lacks_its_generator_is_refused():
    state = Reservoir(4, 0).state_dict()
    del state["generator"]
    with pytest.raises(RuntimeError, match="generator"):
        Reservoir(4, 0).load_state_dict(state, strict=True)


def test_restoring_does_not_share_storage_with_the_state():
    memory = stream(Reservoir(4, 0), torch.arange(4), 4)
    other = Reservoir(4, 0)
    other.load_state_dict(memory.state_dict())
    stream(other, torch.arange(4, 60), 8)
    assert kept(memory) == [0, 1, 2, 3]


def test_extras_travel_with_their_sample_and_widen_with_nan():
    memory = Reservoir(4, 0)
    memory.add(torch.arange(2.0)[:, None], torch.arange(2), logits=torch.tensor([[0.0, 1.0], [2.0, 3.0]]))
    memory.add(torch.arange(2.0, 4.0)[:, None], torch.arange(2, 4), logits=torch.full((2, 3), 7.0))
    _, labels, logits = memory.sample(40)
    wide = logits[labels >= 2]
    narrow = logits[labels < 2]
    assert torch.equal(wide, torch.full_like(wide, 7.0))
    assert narrow[:, 2].isnan().all()
    assert not narrow[:, :2].isnan().any()
    with pytest.raises(ValueError, match="holds"):
        memory.add(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))


def test_bytes_are_stored_as_bytes_and_counted():
    memory = Reservoir(5, 0)
    memory.add(torch.zeros(3, 1, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))
    assert memory.sample(2)[0].dtype == torch.uint8
    assert memory.nbytes == 5 * 16 + 5 * 8


def test_memory_keeps_no_graph():
    memory = Reservoir(2, 0)
    memory.add(torch.ones(2, 1, requires_grad=True) * 2, torch.zeros(2, dtype=torch.int64))
    assert not memory.sample(2)[0].requires_grad


def test_size_must_be_positive():
    with pytest.raises(UserError, match=r"memory: 0 is out of range"):
        Reservoir(0)


def test_archive_keeps_everything_and_round_trips():
    archive, other = Archive(), Archive()
    assert len(archive) == 0
    archive.extend(torch.zeros(2, 3), torch.tensor([0, 1]))
    archive.extend(torch.ones(1, 3), torch.tensor([2]))
    other.load_state_dict(archive.state_dict(), strict=True)
    assert len(other) == 3
    assert torch.equal(other.stored["inputs"], torch.tensor([[0.0] * 3, [0.0] * 3, [1.0] * 3]))


@given(size=st.integers(1, 12), classes=st.lists(st.integers(0, 4), max_size=60), batch=st.integers(1, 9))
@example(size=4, classes=[0] * 4 + [1] * 4 + [2] * 4, batch=12)
@settings(max_examples=60, deadline=None)
def test_a_greedy_memory_equals_its_published_algorithm(size, classes, batch):
    """Sample after sample, with the draws read from a generator alike."""
    memory, generator = Greedy(size, 5), torch.Generator().manual_seed(5)
    for part in torch.arange(len(classes)).split(batch):
        memory.add(part[:, None].double(), torch.tensor(classes, dtype=torch.int64)[part])
    held, met = [], []  # (number, class)
    for number, c in enumerate(classes):
        count = {k: sum(h[1] == k for h in held) for k in met}
        if c in met and count[c] >= size / len(met):
            continue
        met += [] if c in met else [c]
        if len(held) < size:
            held.append((number, c))
            continue
        largest = next(k for k in met if count.get(k, 0) == max(count.values()))
        theirs = [i for i, h in enumerate(held) if h[1] == largest]
        held[theirs[int(torch.rand(1, dtype=torch.float64, generator=generator) * len(theirs))]] = (number, c)
    assert kept(memory) == [number for number, _ in held]
