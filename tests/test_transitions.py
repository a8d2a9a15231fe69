import numpy as np
import pytest
import torch

from clplat.components.transitions import TransitionMemory
from clplat.data.transitions import Transitions, pack, pack_step, unpack
from clplat.errors import UserError
from clplat.stream import Transition

O, A = 3, 2


def transitions(n: int, first: int = 0) -> Transitions:
    """n steps; the reward numbers them."""
    g = torch.Generator().manual_seed(first)
    number = first + torch.arange(n, dtype=torch.float32)
    flags = (number % 2, number % 3 == 0)
    return Transitions(
        torch.randn(n, O, generator=g), torch.rand(n, A, generator=g), number, torch.randn(n, O, generator=g),
        flags[0], flags[1].float(), -number,
    )  # fmt: skip


def test_packing_goes_there_and_back():
    t = transitions(5)
    rows = pack(t)
    assert rows.shape == (5, 2 * O + A + 4)
    assert rows.dtype == torch.float32
    for before, after in zip(t, unpack(rows, A), strict=True):
        assert torch.equal(before, after)


def test_a_step_just_taken_keeps_its_end_and_its_time_limit_apart():
    """A time limit is no end: what follows counts. Its return is not known, and bounds nothing."""
    seen, following = np.ones(O), 2 * np.ones(O)
    for terminated, truncated in ((False, True), (True, False), (False, False)):
        step = Transition(seen, np.zeros(A), 3.0, following, terminated, truncated)
        (t,) = [[x[0].tolist() for x in unpack(pack_step(step), A)]]
        assert t == [[1.0] * O, [0.0] * A, 3.0, [2.0] * O, float(terminated), float(truncated), -np.inf]


def numbers(memory: TransitionMemory) -> set[int]:
    drawn = unpack(memory.sample(500), A).reward
    return {int(x) for x in drawn}


def test_the_oldest_give_way():
    torch.manual_seed(0)
    memory = TransitionMemory(4, A)
    for k in range(6):
        memory.add(pack(transitions(1, k)))
        assert len(memory) == min(k + 1, 4)
    assert numbers(memory) == {2, 3, 4, 5}
    memory.add(pack(transitions(9, 100)))  # more than it holds: the last ones
    assert numbers(memory) == {105, 106, 107, 108}


def test_rows_stay_whole_while_room_is_made():
    torch.manual_seed(0)
    memory = TransitionMemory(10_000, A)
    memory.add(pack(transitions(200)))
    memory.add(pack(transitions(400, 200)))
    assert numbers(memory) <= set(range(600))
    assert len(numbers(memory)) > 100
    assert memory.nbytes < 1000 * 12 * 4  # follows what is held, not what may be


def test_state_goes_on_where_it_was():
    memory, other = TransitionMemory(4, A), TransitionMemory(4, A)
    memory.add(pack(transitions(6)))
    other.load_state_dict(memory.state_dict())
    for m in (memory, other):
        m.add(pack(transitions(1, 50)))
    assert torch.equal(memory.stored["rows"], other.stored["rows"])
    torch.manual_seed(3)
    first = memory.sample(20)
    torch.manual_seed(3)
    assert torch.equal(first, other.sample(20))


def test_an_empty_memory_gives_nothing():
    memory = TransitionMemory(4, A)
    memory.add(pack(transitions(2)))
    memory.clear()
    assert len(memory) == 0
    assert memory.nbytes == 0
    with pytest.raises(ValueError, match="empty"):
        memory.sample(1)
    with pytest.raises(UserError, match="memory"):
        TransitionMemory(0, A)
