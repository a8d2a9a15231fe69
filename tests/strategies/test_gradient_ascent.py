import math

import numpy as np
import pytest
import torch

from clplat import Experience, Kind
from clplat.components.losses import Scored, bounds
from clplat.errors import UserError
from clplat.strategies.gradient_ascent import GradientAscent
from clplat.strategies.naive import Naive


def accuracy(strategy, data):
    x, y = data.all()
    return (strategy.eval().predict(x).argmax(1) == y).float().mean().item()


def cross_entropy(logits, labels):
    """Independent: float64, by its definition, (B,)."""
    logits = np.asarray(logits, dtype=np.float64)
    return np.log(np.exp(logits).sum(1)) - logits[np.arange(len(labels)), labels]


def test_learning_is_plain_training(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(GradientAscent(model=model()), stream).model, drive(Naive(model=model()), stream).model)


@pytest.mark.parametrize("bound", [0.7, 2.0, 100.0, None])
def test_loss_by_hand(bound, linear):
    strategy = GradientAscent(model=linear(), bound=bound)
    x, y = torch.tensor([[0.0, 1.0], [1.0, 0.0], [2.0, 0.0]]), torch.tensor([0, 0, 0])
    strategy.global_batch = 3
    logits = [[0.0, 2.5], [1.0, 0.5], [2.0, 0.5]]
    limit = 2 * math.log(2) if bound is None else bound
    expected = -np.minimum(cross_entropy(logits, [0, 0, 0]), limit).mean()
    assert strategy.forget_step((x, y), 0).item() == pytest.approx(expected, abs=1e-5)


def test_replay_adds_the_loss_on_retained_samples(linear):
    strategy = GradientAscent(model=linear(), bound=100.0, memory=4, replay_batch=3)
    strategy.memory.add(torch.tensor([[1.0, 0.0]]), torch.tensor([0]), rows=torch.tensor([5]))
    strategy.global_batch = 1
    loss = strategy.forget_step((torch.tensor([[0.0, 1.0]]), torch.tensor([0])), 0)
    expected = -cross_entropy([[0.0, 2.5]], [0])[0] + cross_entropy([[1.0, 0.5]], [0])[0]
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_a_sample_at_the_bound_has_no_gradient(linear):
    strategy = GradientAscent(model=linear(), bound=2.0)
    x, y = torch.tensor([[0.0, 1.0], [0.0, 2.0]]), torch.tensor([0, 0])  # losses of 2.58 and 4.51
    strategy.global_batch = 2
    strategy.forget_step((x, y), 0).backward()
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in strategy.model.parameters())
    other = GradientAscent(model=linear(), bound=3.0)
    other.global_batch = 2
    other.forget_step((x, y), 0).backward()
    assert any(p.grad.abs().sum() > 0 for p in other.model.parameters())


def test_below_the_bound_it_climbs(linear):
    """The gradient is that of plain training, turned round."""
    up, down = GradientAscent(model=linear(), bound=50.0), Naive(model=linear())
    x, y = torch.tensor([[0.3, 1.0], [1.0, 0.2]]), torch.tensor([0, 1])
    for strategy, step in ((up, up.forget_step), (down, down.training_step)):
        strategy.global_batch = 2
        step((x, y), 0).backward()
    assert all(torch.equal(a.grad, -b.grad) for a, b in zip(up.parameters(), down.parameters(), strict=True))


def test_the_bound_stops_it(experiences, model, drive, answer, request_for):
    """However long it climbs, weights stand still once every sample is past the bound."""
    (e,) = experiences(1)
    strategy = drive(GradientAscent(model=model(), lr=0.2), [e], epochs=10)
    gone = request_for(1, e, (0,))
    answer(strategy, gone, epochs=40)
    before = {k: v.clone() for k, v in strategy.model.state_dict().items()}
    answer(strategy, gone, epochs=40)
    assert all(torch.equal(v, before[k]) for k, v in strategy.model.state_dict().items())
    assert accuracy(strategy, gone.train) == 0.0


def test_default_bound_counts_classes_that_are_there():
    found = Scored(torch.zeros(2), torch.tensor([3, 1]), None)
    assert bounds(found, None).tolist() == pytest.approx([2 * math.log(3), 2 * math.log(2)])
    assert bounds(found, 1.5).tolist() == [1.5, 1.5]


def test_with_replay_the_rest_stays(experiences, model, drive, answer, request_for):
    stream = experiences(1)
    kept = stream[0].train.subset((stream[0].train.targets() == 1).nonzero()[:, 0])
    gone = request_for(1, stream[0], (0,))
    strategy = drive(GradientAscent(model=model(), lr=0.2, memory=24, replay_batch=8), stream, epochs=10)
    answer(strategy, gone, epochs=20)
    assert accuracy(strategy, gone.train) == 0.0
    assert accuracy(strategy, kept) == 1.0
    assert set(strategy.memory.data().labels.tolist()) == {1}  # what is replayed is not what is erased


def test_an_erased_class_can_be_learned_again(experiences, model, drive, answer, request_for):
    (e,) = experiences(1)
    strategy = drive(GradientAscent(model=model(), lr=0.1, memory=24, replay_batch=8), [e], epochs=10)
    gone = request_for(1, e, (0,))
    answer(strategy, gone)
    drive(strategy, [Experience(2, "again", Kind.LEARN, gone.train, classes=(0,))], epochs=30)
    assert accuracy(strategy, gone.train) > 0.9
    assert set(strategy.memory.data().labels.tolist()) == {0, 1}


def test_refuses_values_out_of_range(model):
    with pytest.raises(UserError, match=r"strategy.bound: 0 is out of range \(valid: > 0, or null\)"):
        GradientAscent(model=model(), bound=0)
    with pytest.raises(UserError, match=r"strategy.replay_batch: -1"):
        GradientAscent(model=model(), replay_batch=-1)


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: GradientAscent(model=model(), memory=10), experiences())
