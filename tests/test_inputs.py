"""Inputs that are not in memory: indexed as a tensor is, and read ahead without a trace in what is read."""

from __future__ import annotations

import copy
import subprocess
import sys
import threading
from multiprocessing.reduction import ForkingPickler

import pytest
import torch

from clplat.errors import MissingError
from clplat.inputs import AHEAD, Inputs, default_workers
from clplat.stream import Data


class Counted(Inputs):
    """Row r holds r in all of (2, 3); notes what is read, and refuses row 13."""

    def __init__(self, count: int = 20, workers: int | None = 3) -> None:
        super().__init__((count, 2, 3), torch.float32, span=(0.0, count - 1.0), workers=workers)
        self.seen: list[int] = []
        self.lock = threading.Lock()

    def __getstate__(self):
        return {**super().__getstate__(), "lock": None}

    def read(self, rows, out):
        if 13 in rows:
            raise MissingError("row 13 is gone")
        with self.lock:
            self.seen += rows
        out.numpy()[:] = torch.tensor(rows, dtype=torch.float32).view(-1, 1, 1).numpy()


def rows_of(batch: torch.Tensor) -> list[int]:
    assert (batch == batch[:, :1, :1]).all()
    return batch[:, 0, 0].int().tolist()


@pytest.mark.parametrize("rows", [[], [5], [3, 3, 0], [7, 19, 2, 1, 0, 4, 8]], ids=str)
def test_a_batch_holds_its_rows_in_their_order(rows):
    data = Data(Counted(), torch.arange(20), torch.arange(20).flip(0))
    inputs, labels = data.batch(torch.tensor(rows, dtype=torch.int64))
    assert rows_of(inputs) == labels.tolist() == [19 - r for r in rows]
    assert inputs.shape == (len(rows), 2, 3)
    assert (len(data), data.row_ids().shape, repr(data)) == (
        20,
        (20,),
        "Data(20 of 20 samples, (2, 3) float32, labelled)",
    )


def test_batches_are_read_before_they_are_asked_for_and_once():
    inputs = Counted()
    parts = torch.arange(12).split(4)
    coming = Data(inputs, None, torch.arange(20)).ahead(iter(parts))
    assert inputs.seen == []
    for number, part in enumerate(parts):
        assert rows_of(coming.batch(part)[0]) == part.tolist()
        begun = coming.inputs._begun
        assert len(begun) == min(AHEAD, 2 - number)
        for _, reading in begun:
            reading.result()
        assert sorted(inputs.seen) == list(range(min(12, 4 * (number + 1 + AHEAD))))


def test_other_rows_than_announced_are_read_all_the_same():
    inputs = Counted()
    coming = Data(inputs, None).ahead(torch.arange(12).split(4))
    assert rows_of(coming.batch(torch.tensor([9, 2]))[0]) == [9, 2]
    assert rows_of(coming.batch(torch.arange(4))[0]) == [0, 1, 2, 3]
    assert rows_of(coming.batch(torch.arange(8, 12))[0]) == [8, 9, 10, 11]
    assert rows_of(coming.batch(torch.arange(4, 8))[0]) == [4, 5, 6, 7]


def test_what_cannot_be_read_is_raised_where_it_is_asked_for():
    coming = Data(Counted(), None).ahead(torch.arange(20).split(5))
    assert rows_of(coming.batch(torch.arange(5))[0]) == [0, 1, 2, 3, 4]
    coming.batch(torch.arange(5, 10))
    with pytest.raises(MissingError, match="row 13 is gone"):
        coming.batch(torch.arange(10, 15))


def test_split_gives_all_in_order():
    assert [r for part in Counted(13).split(5) for r in rows_of(part)] == list(range(13))


def test_data_in_memory_are_handed_on_as_they_are():
    data = Data(torch.arange(4.0), None)
    assert data.ahead([torch.arange(2)]) is data


def test_moved_once_and_shared_by_what_shared_them():
    inputs, moved = Counted(), {}
    one, other = (
        Data(inputs, torch.arange(20), rows).to(torch.device("meta"), moved) for rows in (None, torch.arange(3))
    )
    assert one.inputs is other.inputs
    assert one.inputs.device.type == one.labels.device.type == "meta"
    assert inputs.device.type == "cpu"


def test_travels_to_another_process_and_is_copied_without_its_threads():
    inputs = Counted()
    inputs[torch.arange(2)]
    for made in (ForkingPickler.loads(ForkingPickler.dumps(inputs)), copy.deepcopy(inputs)):
        made.lock = threading.Lock()
        assert rows_of(made[torch.tensor([4])]) == [4]
    assert 1 <= default_workers() <= 8


def test_the_end_of_the_process_waits_for_what_is_being_read_and_begins_no_more():
    """A thread in code of torch would abort the process while Python is taken down."""
    code = """
import time, torch
from clplat.inputs import Inputs
class Slow(Inputs):
    def read(self, rows, out):
        print("began", flush=True)
        time.sleep(0.3)
        print("ended", flush=True)
held = Slow((4, 1), torch.float32, workers=1)
reading = [held.start(torch.tensor([row])) for row in range(3)]
time.sleep(0.1)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert (done.returncode, done.stdout.split()) == (0, ["began", "ended"]), done.stderr
