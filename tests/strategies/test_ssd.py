import numpy as np
import pytest
import torch

from clplat import Experience, Kind
from clplat.errors import UserError
from clplat.strategies.naive import Naive
from clplat.strategies.ssd import SSD


def accuracy(strategy, data):
    x, y = data.all()
    return (strategy.eval().predict(x).argmax(1) == y).float().mean().item()


def importance_of(net, data):
    """Independent: of a linear model in float64, the mean over samples of the squared gradient of their cross-entropy,
    (C, D) of the weights and (C,) of the biases."""
    x, y = (t.numpy() for t in data.all())
    z = x @ net.head.weight.detach().double().numpy().T + net.head.bias.detach().double().numpy()
    p = np.exp(z) / np.exp(z).sum(1, keepdims=True)
    residual = p - np.eye(z.shape[1])[y]  # (n, C)
    return (residual[:, :, None] ** 2 * x[:, None] ** 2).mean(0), (residual**2).mean(0)


def learned(experiences, model, drive, **options):
    """A linear model that has learned two classes, and the request for one of them."""
    (e,) = experiences(1)
    options = {"memory": None, "lr": 0.05} | options
    return drive(SSD(model=model(hidden=()), **options).double(), [double(e)], epochs=2), e


def double(e):
    data = e.train
    return Experience(
        e.index, e.name, e.kind, type(data)(data.inputs.double(), data.labels, data.rows), classes=e.classes
    )


@pytest.mark.parametrize(("alpha", "dampening"), [(1.5, 1.0), (1.5, 0.3), (1.5, 3.0), (1e-9, 1.0)])
def test_weights_are_dampened_as_in_the_paper(alpha, dampening, experiences, model, drive, answer, request_for):
    strategy, e = learned(experiences, model, drive, alpha=alpha, dampening=dampening)
    gone = request_for(1, double(e), (0,))
    everything, erased = importance_of(strategy.model, double(e).train), importance_of(strategy.model, gone.train)
    before = [strategy.model.head.weight.detach().numpy().copy(), strategy.model.head.bias.detach().numpy().copy()]
    strategy.grow(gone)
    strategy.begin(gone)
    after = [strategy.model.head.weight.detach().numpy(), strategy.model.head.bias.detach().numpy()]
    changed = 0
    for theta, whole, own, found in zip(before, everything, erased, after, strict=True):
        chosen = own > alpha * whole
        factor = np.where(chosen, np.minimum(dampening * whole / np.where(own > 0, own, 1.0), 1.0), 1.0)
        np.testing.assert_allclose(found, theta * factor, atol=1e-12, rtol=0)
        assert (np.abs(found) <= np.abs(theta)).all()
        changed += chosen.sum()
    assert changed > 0
    assert strategy.measurements() == {"dampened": pytest.approx(changed / sum(b.size for b in before))}


def test_a_request_takes_no_step_and_leaves_nothing_in_the_memory(
    experiences, model, drive, answer, request_for, equal
):
    strategy, e = learned(experiences, model, drive, alpha=1.0)
    gone, steps = request_for(1, double(e), (0,)), []
    strategy.training_data(gone)
    answer(strategy, gone, epochs=3, each_step=lambda *_: steps.append(1))
    assert steps == []
    assert set(strategy.memory.data().labels.tolist()) == {1}


def test_weights_that_matter_alike_stay(experiences, model, drive, request_for):
    """A request for everything: both importances are one."""
    strategy, e = learned(experiences, model, drive, alpha=1.0)
    before = [p.detach().clone() for p in strategy.model.parameters()]
    everything = request_for(1, double(e), (0, 1))
    strategy.grow(everything)
    with pytest.warns(UserWarning, match=r"strategy\.alpha: no weight matters 1 times .*: the request changes nothing"):
        strategy.begin(everything)
    assert all(torch.equal(p, b) for p, b in zip(strategy.model.parameters(), before, strict=True))
    assert strategy.measurements() == {"dampened": 0.0}


def test_learning_is_plain_training(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(SSD(model=model()), stream).model, drive(Naive(model=model()), stream).model)


def test_it_forgets_the_class_and_learns_it_again(experiences, model, drive, answer, request_for):
    stream = experiences(3)
    strategy = drive(SSD(model=model(hidden=(30,)), lr=0.1, memory=72, alpha=3.0), [
        Experience(0, "all", Kind.LEARN, whole(stream), classes=tuple(range(6)))], epochs=20)  # fmt: skip
    e = Experience(0, "all", Kind.LEARN, whole(stream), classes=tuple(range(6)))
    gone = request_for(1, e, (0,))
    kept = e.train.subset((e.train.targets() != 0).nonzero()[:, 0])
    before = accuracy(strategy, kept)
    assert accuracy(strategy, gone.train) == 1.0
    answer(strategy, gone)
    assert accuracy(strategy, gone.train) < 0.5
    assert accuracy(strategy, kept) > before - 0.2
    drive(strategy, [Experience(2, "again", Kind.LEARN, gone.train, classes=(0,))], epochs=20)
    assert accuracy(strategy, gone.train) > 0.9


def whole(stream):
    """The data of all its experiences as one."""
    data = stream[0].train
    return type(data)(data.inputs, data.labels, torch.arange(len(data.labels)))


def test_nothing_learned_is_the_users_mistake(experiences, model, request_for):
    (e,) = experiences(1)
    strategy, gone = SSD(model=model()), request_for(0, e, (0,))
    strategy.grow(gone)
    with pytest.raises(UserError, match="this run has learned nothing"):
        strategy.begin(gone)


@pytest.mark.parametrize("option", ["alpha", "dampening"])
def test_refuses_values_out_of_range(option, model):
    with pytest.raises(UserError, match=rf"strategy.{option}: -1 is out of range"):
        SSD(model=model(), **{option: -1})
