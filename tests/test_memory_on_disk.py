"""A memory in a file is the memory in memory: what it holds and draws, after erasures, and after a kill."""

from __future__ import annotations

import copy
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clplat import Data, Experience, Kind
from clplat.components.filed import Filed, content
from clplat.components.memory import ClassBalanced, Greedy, Reservoir
from clplat.errors import MissingError

MAKE = [Reservoir, ClassBalanced, Greedy]
N, CLASSES, KEPT = 60, 4, 2
INPUTS = torch.arange(1, N + 1, dtype=torch.int32)[:, None, None].repeat(1, 2, 3)  # a sample is its number from 1
LABELS = torch.arange(N) % CLASSES
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("fill"), st.sets(st.integers(0, N - 1), max_size=30)),
        st.tuples(st.just("erase"), st.sets(st.integers(0, N - 1), min_size=1, max_size=30)),
        st.tuples(st.just("save"), st.none()),
        st.tuples(st.just("kill"), st.none()),
    ),
    max_size=9,
)


def offer(memory, rows) -> None:
    memory.fill(Data(INPUTS, LABELS, torch.tensor(sorted(rows), dtype=torch.int64)))


def erase(memory, rows) -> None:
    data = Data(INPUTS, LABELS, torch.tensor(sorted(rows)))
    memory.erase(Experience(0, "forget", Kind.FORGET, data, classes=()))


def in_file(make, file: Path, size: int = 12):
    memory = make(size, 0)
    memory.file, memory.goes_on = file, True
    return memory


def state_of(memory) -> dict:
    return {k: v.clone() for k, v in memory.state_dict().items()}


def numbers(file: Path) -> set[int]:
    """All samples that the bytes of a file hold."""
    content = bytearray(file.read_bytes() if file.exists() else b"")
    held = torch.frombuffer(content, dtype=torch.int32) if content else INPUTS[:0]
    return set(held.unique().tolist()) - {0}


def same(one, other) -> None:
    assert len(one) == len(other)
    assert one.generator.get_state().equal(other.generator.get_state())
    if len(one):
        for a, b in zip(one.everything(), other.everything(), strict=True):
            assert torch.equal(a, b)
            assert a.dtype == b.dtype
        for a, b in zip(one.sample(7), other.sample(7), strict=True):
            assert torch.equal(a, b)
        assert one.nbytes == other.nbytes


@pytest.mark.parametrize("make", MAKE)
@given(operations=OPERATIONS)
@settings(max_examples=30, deadline=None)
def test_any_sequence_of_learning_erasing_saving_and_kills(make, operations, tmp_path_factory):
    """After a kill either memory goes on from its last checkpoint; the file holds what one of the kept ones does."""
    file = tmp_path_factory.mktemp("m") / "rows"
    plain, filed, saved = make(12, 0), in_file(make, file), []
    for what, rows in [("save", None), *operations]:
        if what == "fill":
            offer(plain, rows), offer(filed, rows)
        elif what == "erase":
            erase(plain, rows), erase(filed, rows)
        elif what == "save":
            saved = [*saved, (state_of(plain), state_of(filed))][-KEPT:]
            for held in filed.filed():
                held.checkpointed(KEPT)
        else:
            plain, filed = make(12, 0), in_file(make, file)
            plain.load_state_dict(saved[-1][0])
            filed.load_state_dict(saved[-1][1])
        same(plain, filed)
        if filed.filed():
            wanted = {int(x) for state, _ in saved for x in state.get("stored.inputs", INPUTS[:0]).unique()} - {0}
            wanted |= {int(x) for x in plain.stored["inputs"].unique()} - {0}
            assert numbers(file) >= wanted
    for held in filed.filed():
        for _ in range(KEPT):  # as many checkpoints on, nothing else is there
            held.checkpointed(KEPT)
        held.let_go(KEPT)
        assert numbers(file) == {int(x) for x in plain.stored["inputs"].unique()} - {0}


def test_what_is_written_after_a_checkpoint_leaves_it_and_the_one_before_whole(tmp_path):
    memory, states, held = in_file(Reservoir, tmp_path / "rows"), [], []
    for step in range(3):
        offer(memory, range(20 * step, 20 * step + 20))
        states.append(state_of(memory))
        held.append(memory.everything()[0])
        memory.filed()[0].checkpointed(KEPT)
    offer(memory, range(60))
    for state, inputs in zip(states[1:], held[1:], strict=True):  # the newest, or if it is damaged the one before
        old = Reservoir(12, 0)
        old.file = tmp_path / "rows"
        old.load_state_dict(state)
        assert torch.equal(old.everything()[0], inputs)
        with pytest.raises(ValueError, match="only read"):
            offer(old, range(60))


def test_a_place_is_used_again_and_what_was_written_since_a_checkpoint_is_written_over(tmp_path):
    memory = in_file(Reservoir, tmp_path / "rows")
    for step in range(40):
        for _ in range(3):
            memory.seen = 12 * (step > 0)  # so that all of a batch are taken
            offer(memory, range(step, step + 12))
        memory.filed()[0].checkpointed(KEPT)
    assert (tmp_path / "rows").stat().st_size <= (KEPT + 2) * 12 * 24


def test_erased_samples_leave_the_file_as_soon_as_no_kept_checkpoint_has_them(tmp_path):
    memory = in_file(Reservoir, tmp_path / "rows", size=N)
    offer(memory, range(30))
    held = memory.filed()[0]
    held.checkpointed(KEPT)
    offer(memory, range(30, N))
    erase(memory, [3, 40])
    assert 41 not in numbers(tmp_path / "rows")  # no checkpoint ever had it
    assert 4 in numbers(tmp_path / "rows")
    held.checkpointed(KEPT)
    assert 4 in numbers(tmp_path / "rows")
    held.checkpointed(KEPT)
    assert 4 in numbers(tmp_path / "rows")  # while this one is being written, the one that has it is kept
    held.let_go(KEPT)
    assert 4 not in numbers(tmp_path / "rows")
    assert len(numbers(tmp_path / "rows")) == N - 2


def test_what_a_killed_run_wrote_last_is_taken_out(tmp_path):
    memory = in_file(Reservoir, tmp_path / "rows", size=N)
    offer(memory, range(20))
    state = state_of(memory)
    memory.filed()[0].checkpointed(KEPT)
    offer(memory, range(20, 40))
    again = in_file(Reservoir, tmp_path / "rows", size=N)
    again.load_state_dict(state)
    assert numbers(tmp_path / "rows") == set(range(1, 21))


def test_a_checkpoint_holds_no_inputs(tmp_path):
    memory, inputs = in_file(Reservoir, tmp_path / "rows"), torch.randn(40, 3, 50, 50)
    memory.add(inputs, torch.arange(40) % 3, rows=torch.arange(40))
    assert sum(t.nbytes for t in memory.state_dict().values()) < 7000 < 12 * 30000 == memory.bytes_on_disk
    assert torch.equal(memory.everything()[0], inputs[memory.everything()[2]])
    assert all("filed" not in k or k.endswith((".sums", ".like")) for k in content(memory.state_dict()))


@pytest.mark.parametrize("how", ["gone", "short", "other", "unknown"])
def test_a_file_that_is_not_as_it_was_left_is_refused(tmp_path, how):
    file, memory = tmp_path / "rows", in_file(Reservoir, tmp_path / "rows")
    offer(memory, range(12))
    again = in_file(Reservoir, None if how == "unknown" else file)
    message = {"gone": "rows is missing: put back", "short": r"rows has 270 bytes, not 288: put back",
               "other": r"rows is damaged in place 11: put", "unknown": "in a file of its run's folder"}  # fmt: skip
    if how == "gone":
        file.unlink()
    elif how == "short":
        os.truncate(file, 270)
    elif how == "other":
        file.write_bytes(file.read_bytes()[:-1] + b"\7")
    with pytest.raises(MissingError, match=message[how]):  # noqa: PT012 - the file is looked at first, then read
        again.load_state_dict(memory.state_dict())
        again.everything()


def test_a_copy_is_in_memory(tmp_path):
    memory = in_file(Reservoir, tmp_path / "rows")
    offer(memory, range(12))
    twin = copy.deepcopy(memory)
    assert not twin.filed()
    twin.stored["inputs"].zero_()
    assert memory.everything()[0].min() > 0


def test_rows_of_another_kind_are_refused(tmp_path):
    memory = in_file(Reservoir, tmp_path / "rows")
    offer(memory, range(4))
    with pytest.raises(ValueError, match=r"holds inputs \(\(2, 3\), torch.int32\), got \(\(2, 3\), torch.float32\)"):
        memory.add(INPUTS[:4].float(), LABELS[:4], rows=torch.arange(4))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.bool, torch.uint8])
def test_any_type_comes_back(tmp_path, dtype):
    rows = torch.randn(6, 3, 5).to(dtype)
    held = Filed(tmp_path / "rows", rows, 8)
    held.index_copy_(0, torch.tensor([5, 0, 7, 1, 2, 3]), rows)
    assert torch.equal(held[torch.tensor([7, 5, 4])], torch.stack([rows[2], rows[0], torch.zeros(3, 5).to(dtype)]))
