"""What a request makes of a stream, and the stream that would have been without what it erased."""

import pytest
import torch

from clplat import Data, Experience, Kind, Stream
from clplat.erasure.counterfactual import counterfactual
from clplat.erasure.requests import History
from clplat.errors import UserError

INPUTS, LABELS = torch.arange(20.0)[:, None], torch.arange(20) % 4
TEST_INPUTS, TEST_LABELS = 100 + torch.arange(8.0)[:, None], torch.arange(8) % 4


def learn(index, rows, test, *, world=None, task=0, classes=None, valid=None):
    rows = torch.as_tensor(rows)
    return Experience(
        index, f"e{index}", Kind.LEARN, Data(INPUTS, LABELS, rows, world),
        Data(TEST_INPUTS, TEST_LABELS, torch.as_tensor(test), world),
        None if valid is None else Data(INPUTS, LABELS, torch.as_tensor(valid), world),
        classes=tuple(sorted(set(LABELS[rows].tolist()))) if classes is None else classes, task=task,
    )  # fmt: skip


def of(*classes, count=20):
    return [i for i in range(count) if i % 4 in classes]


def history(*experiences, **kw):
    found = History(**kw)
    for e in experiences:
        found.add(e)
    return found


SPLIT = (learn(0, of(0, 1), of(0, 1, count=8)), learn(1, of(2, 3), of(2, 3, count=8), task=1))
TURNED = [torch.neg, torch.abs]
GUISES = tuple(learn(i, range(20), range(8), world=w, task=i) for i, w in enumerate([None, *TURNED]))


def rows(data):
    return data.row_ids().tolist()


def test_a_class():
    e = history(*SPLIT).forget("forget-0", ["class:3", "class:2"])
    assert (e.index, e.name, e.kind, e.classes, e.task) == (2, "forget-0", Kind.FORGET, (2, 3), 1)
    assert e.request == ("class:3", "class:2")
    assert rows(e.train) == of(2, 3)
    assert rows(e.test) == of(2, 3, count=8)
    assert e.train.inputs is INPUTS
    assert e.test.inputs is TEST_INPUTS
    assert e.valid is None


def test_samples_are_scored_on_themselves_and_keep_their_class():
    e = history(*SPLIT).forget("f", ["sample:6", "sample:0"])
    assert rows(e.train) == rows(e.test) == [0, 6]
    assert e.test.inputs is INPUTS
    assert e.classes == ()


def test_an_experience_takes_its_classes_where_nothing_else_holds_them():
    assert history(*SPLIT).forget("f", ["experience:e0"]).classes == (0, 1)
    again = learn(2, [0, 2], [0, 4, 2, 6])  # classes 0 and 2 once more
    moved = Data(INPUTS, LABELS, torch.tensor([4, 8, 12, 16, *of(1)]))
    first = Experience(0, "e0", Kind.LEARN, moved, SPLIT[0].test, classes=(0, 1))
    e = history(first, SPLIT[1], again).forget("f", ["experience:e0"])
    assert e.classes == (1,)
    assert sorted(rows(e.train)) == sorted([4, 8, 12, 16, *of(1)])
    assert rows(e.test) == of(1, count=8)  # the test samples of class 0 belong to e2 too


def test_an_experience_in_a_guise_of_its_own():
    e = history(*GUISES).forget("f", ["experience:e1"])
    assert e.classes == ()
    assert e.train.world is e.test.world is TURNED[0]
    assert (len(e.train), len(e.test), e.task) == (20, 8, 1)


def test_a_class_in_several_guises_is_refused():
    for ids in (["class:1"], ["experience:e0", "experience:e1"]):
        with pytest.raises(UserError, match=r"several data sets or guises \(e0, e1"):
            history(*GUISES).forget("f", ids)
    with pytest.raises(UserError, match="sample:3 is a row of several data sets"):
        history(*GUISES).forget("f", ["sample:3"])


def test_users():
    users = {0: (SPLIT[0].train, torch.tensor([0, 1, 4])), 1: (SPLIT[1].train, torch.tensor([2, 0]))}
    h = history(*SPLIT, users=users)
    h.add(h.forget("f", ["user:0"]))
    assert rows(h.experiences[-1].train) == rows(h.experiences[-1].test) == [0, 1, 4]
    assert rows(h.forget("g", ["user:1"]).train) == [2]  # what is erased already is not asked for again
    with pytest.raises(UserError, match="user:0 has no samples that are learned"):
        h.forget("g", ["user:0"])
    with pytest.raises(UserError, match="user:5 is unknown \\(valid: user:0 to user:1\\)"):
        h.forget("g", ["user:5"])


def test_what_is_erased_is_left_out_of_later_requests():
    h = history(*SPLIT)
    h.add(h.forget("f", ["sample:0", "sample:4"]))
    h.add(h.forget("g", ["class:1"]))
    e = h.forget("h", ["experience:e0"])
    assert rows(e.train) == [8, 12, 16]
    assert e.classes == (0,)
    assert rows(e.test) == of(0, count=8)


def test_tasks_that_are_told_apart():
    with pytest.raises(UserError, match=r"belong to tasks \[0, 1\]"):
        history(*SPLIT, task_known=True).forget("f", ["class:1", "class:2"])
    assert history(*SPLIT, task_known=True).forget("f", ["class:2"]).task == 1


def test_validation_data_follow():
    h = history(learn(0, of(0, 1)[2:], of(0, 1, count=8), valid=of(0, 1)[:2]))
    assert rows(h.forget("f", ["class:1"]).valid) == [1]
    assert rows(h.forget("f", ["sample:4"]).valid) == [4]


def test_teaching_again():
    h = history(*SPLIT)
    h.add(h.forget("f", ["class:1"]))
    e = h.teach("r", ["class:1"])
    assert (e.kind, e.classes, rows(e.train), rows(e.test)) == (Kind.LEARN, (1,), of(1), of(1, count=8))
    h.add(e)
    assert rows(h.forget("g", ["class:1"]).train) == of(1)
    with pytest.raises(UserError, match="class:0 has no samples that are erased"):
        h.teach("r", ["class:0"])
    with pytest.raises(UserError, match="'nothing' can't be taught"):
        h.teach("r", [])


# --- the counterfactual ---------------------------------------------------------------------------------------------


def stream(*experiences, **kw):
    return Stream(experiences, num_classes=4, input_shape=(1,), **kw)


def facts(s):
    return [(e.index, e.name, e.classes, rows(e.train), e.test and rows(e.test)) for e in s]


def test_erased_pairs_are_deleted():
    h = history(*SPLIT)
    h.add(h.forget("f", ["class:1"]))
    h.add(h.forget("g", ["sample:2"]))
    full = stream(*h.experiences)
    assert facts(counterfactual(full, 1)) == facts(stream(*SPLIT))
    after_one = [(0, "e0", (0,), of(0), of(0, count=8)), (1, "e1", (2, 3), of(2, 3), of(2, 3, count=8))]
    assert facts(counterfactual(full, 2)) == after_one
    found = facts(counterfactual(full, 3))
    assert found[1][3] == [r for r in of(2, 3) if r != 2]
    assert found[1][2] == (2, 3)
    assert found[1][4] == of(2, 3, count=8)  # test samples stay: only training samples were erased
    assert len(full) == 4  # as it was


def test_an_experience_erased_as_a_whole_is_left_out():
    h = history(*SPLIT)
    h.add(h.forget("f", ["experience:e0"]))
    assert [e.name for e in counterfactual(stream(*h.experiences), 2)] == ["e1"]
    guises = history(*GUISES)
    guises.add(guises.forget("f", ["experience:e1"]))
    found = counterfactual(stream(*guises.experiences), 3)
    assert [(e.name, len(e.train), len(e.test)) for e in found] == [("e0", 20, 8), ("e2", 20, 8)]


def test_what_is_taught_again_stays():
    h = history(*SPLIT)
    h.add(h.forget("f", ["class:1"]))
    h.add(h.teach("r", ["class:1"]))
    found = facts(counterfactual(stream(*h.experiences), 3))
    assert [f[1:4] for f in found] == [("e0", (0,), of(0)), ("e1", (2, 3), of(2, 3)), ("r", (1,), of(1))]


def test_a_few_samples_may_stand_for_a_class():
    few = Experience(2, "f", Kind.FORGET, Data(INPUTS, LABELS, torch.tensor([1])), None, classes=(1,),
                     request=("class:1",))  # fmt: skip
    assert facts(counterfactual(stream(*SPLIT, few), 2))[0][3] == of(0)


def test_it_keeps_what_the_stream_does_to_a_batch():
    found = counterfactual(stream(*SPLIT, normalize=([0.5], [2.0]), task_known=True), 1)
    assert found.task_known
    assert torch.equal(found.prepare(torch.tensor([[4.5]]), False), torch.tensor([[2.0]]))
