import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clplat import Experience, Kind
from clplat.errors import UserError
from clplat.strategies.naive import Naive
from clplat.strategies.random_labels import RandomLabels, other_labels


def accuracy(strategy, data):
    x, y = data.all()
    return (strategy.eval().predict(x).argmax(1) == y).float().mean().item()


def begun(strategy, request):
    strategy.train()
    strategy.grow(request)
    strategy.begin(request)
    return strategy


@given(
    choices=st.sets(st.integers(0, 9), min_size=2), labels=st.lists(st.integers(0, 9), max_size=30), seed=st.integers()
)
@settings(max_examples=100, deadline=None)
def test_a_wrong_label_is_one_of_the_choices_and_never_the_true_one(choices, labels, seed):
    generator = torch.Generator().manual_seed(abs(seed) % 2**31)
    drawn = other_labels(torch.tensor(labels, dtype=torch.int64), torch.tensor(sorted(choices)), generator).tolist()
    assert len(drawn) == len(labels)
    assert set(drawn) <= choices
    assert all(a != b for a, b in zip(drawn, labels, strict=True))


def test_wrong_labels_are_uniform():
    generator = torch.Generator().manual_seed(0)
    for label, choices in ((4, [1, 4, 7, 8]), (0, [1, 4, 7])):
        drawn = other_labels(torch.full((30000,), label), torch.tensor(choices), generator)
        shares = torch.bincount(drawn, minlength=9)[[c for c in choices if c != label]] / 30000
        assert (shares - 1 / 3).abs().max() < 0.015


def test_no_other_class_is_the_users_mistake(experiences, model, drive, answer, request_for):
    with pytest.raises(UserError, match="needs a class that is learned"):
        other_labels(torch.tensor([3]), torch.tensor([3]), torch.Generator())
    (e,) = experiences(1)
    strategy = drive(RandomLabels(model=model()), [e])
    with pytest.raises(UserError, match="needs a class that is learned"):
        answer(strategy, request_for(1, e, (0, 1)))


def test_learning_is_plain_training(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(RandomLabels(model=model()), stream).model, drive(Naive(model=model()), stream).model)


def test_labels_are_drawn_once_a_request_not_at_each_access(experiences, model, drive, answer, request_for):
    """Public code draws them anew whenever a sample is read."""
    (e,) = experiences(1, per_class=40)
    strategy, seen = drive(RandomLabels(model=model(), replay_batch=0), [e]), {}
    gone = request_for(1, e, rows=e.train.row_ids()[::2])
    whole = e.train.labels.clone()

    def note(x, y, loss):
        for row, label in zip(strategy.rows.tolist(), y.tolist(), strict=True):
            seen.setdefault(row, []).append(label)

    answer(strategy, gone, epochs=6, each_step=note)
    assert sorted(seen) == sorted(gone.train.row_ids().tolist())
    assert all(len(labels) == 6 and len(set(labels)) == 1 for labels in seen.values())
    assert all(labels[0] != whole[row] for row, labels in seen.items())
    assert torch.equal(e.train.labels, whole)  # the data set's own labels are not written to
    assert len(strategy.wrong) == 0  # and nothing of the request is kept


def test_labels_come_from_classes_that_are_learned_and_not_erased(experiences, model, drive, answer, request_for):
    stream = experiences(3, per_class=60)
    strategy = drive(RandomLabels(model=model()), stream[:2], epochs=1)
    answer(strategy, request_for(2, stream[0], (1,)), epochs=1)
    begun(strategy, request_for(3, stream[1], (3,)))
    assert set(strategy.wrong.tolist()) == {0, 2}  # not 1, erased before; not 3; not 4 and 5, to come
    drive(strategy, [Experience(4, "again", Kind.LEARN, stream[0].train, classes=(0, 1))], epochs=1)
    begun(strategy, request_for(5, stream[0], (0,)))
    assert set(strategy.wrong.tolist()) == {1, 2}


def test_loss_by_hand(linear):
    strategy = RandomLabels(model=linear(), memory=4, replay_batch=3)
    strategy.memory.add(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), rows=torch.tensor([5]))
    strategy.global_batch = 1
    loss = strategy.forget_step((torch.tensor([[0.0, 1.0]]), torch.tensor([0])), 0)
    new, replayed = (torch.tensor([[0.0, 2.5]]).double(), torch.tensor([[1.0, 0.5]]).double())
    expected = -(new.log_softmax(1)[0, 0] + 3 * replayed.log_softmax(1)[0, 0]) / 4
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_request_resumed_in_its_middle_has_the_same_labels(experiences, model, drive, request_for):
    stream = experiences(3)
    strategy = drive(RandomLabels(model=model()), stream)
    gone = request_for(3, stream[0], rows=stream[0].train.row_ids())
    begun(strategy, gone)
    drawn = strategy.training_data(gone).targets()
    assert torch.equal(strategy.training_data(gone).targets(), drawn)  # asked again, as on resume: drawn no more
    other = RandomLabels(model=model())
    for e in (*stream, gone):
        other.grow(e)
    other.load_state_dict(copy.deepcopy(strategy.state_dict()), strict=True)
    assert torch.equal(other.training_data(gone).targets(), drawn)
    assert other.active == strategy.active
    for s in (strategy, other):
        s.end(gone)
        begun(s, request_for(4, stream[1], rows=stream[1].train.row_ids()))
    assert torch.equal(other.wrong, strategy.wrong)


def test_it_forgets_the_class_and_learns_it_again(experiences, model, drive, answer, request_for):
    stream = experiences(1)
    strategy = drive(RandomLabels(model=model(), lr=0.2, memory=24, replay_batch=8), stream, epochs=10)
    gone = request_for(1, stream[0], (0,))
    kept = stream[0].train.subset((stream[0].train.targets() == 1).nonzero()[:, 0])
    answer(strategy, gone, epochs=20)
    assert accuracy(strategy, gone.train) == 0.0
    assert accuracy(strategy, kept) == 1.0
    assert set(strategy.memory.data().labels.tolist()) == {1}
    drive(strategy, [Experience(2, "again", Kind.LEARN, gone.train, classes=(0,))], epochs=20)
    assert accuracy(strategy, gone.train) > 0.9


def test_refuses_a_negative_replay(model):
    with pytest.raises(UserError, match=r"strategy.replay_batch: -1 is out of range"):
        RandomLabels(model=model(), replay_batch=-1)
