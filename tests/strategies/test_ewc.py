import pytest
import torch
import torch.nn.functional as F

from clplat import Data, Experience, Kind
from clplat.components.consolidation import quadratic
from clplat.components.per_parameter import trainable
from clplat.errors import UserError
from clplat.strategies.ewc import EWC, fisher
from clplat.strategies.naive import Naive


def test_penalty_by_hand():
    parameters, importance, centre = [torch.tensor([1.0, 2.0])], [torch.tensor([0.5, 3.0])], [torch.tensor([0.0, 4.0])]
    assert quadratic(parameters, importance, centre).item() == 0.5 * 1 + 3 * 4


@pytest.mark.parametrize("group", [1, 2, 3, 10])
def test_fisher_equals_a_loop_over_groups(experiences, model, group, monkeypatch):
    monkeypatch.setattr("clplat.components.fisher.VALUES_AT_ONCE", 200)  # so that several chunks are needed
    net, stream = model(), experiences(1)
    net.grow(stream[0])
    x, y = stream[0].train.all()
    x, y = x[:11], y[:11]
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    parts = list(zip(x.split(group), y.split(group), strict=True))
    for xs, ys in parts:
        gradients = torch.autograd.grad(F.cross_entropy(net(xs), ys), list(net.parameters()))
        for name, g in zip(expected, gradients, strict=True):
            expected[name] += g**2 / len(parts)
    found = fisher(net, x, y, group)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name])


def test_loss_by_hand(linear):
    strategy = EWC(model=linear(), penalty=10.0)
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    first = Experience(0, "a", Kind.LEARN, Data(x, y), classes=(0, 1))
    strategy.grow(first)
    plain = strategy.training_step((x, y), 0).item()
    strategy.end(first)
    strategy.grow(Experience(1, "b", Kind.LEARN, None, classes=(0, 1)))
    with torch.no_grad():
        strategy.model.head.bias += torch.tensor([1.0, 1.0])  # moves the penalty, not the cross-entropy
    p = torch.tensor([1.0, 0.5]).softmax(0)[1].item()  # the gradient by the two biases is (-p, p)
    assert abs(strategy.training_step((x, y), 0).item() - (plain + 10 * 2 * p**2)) < 1e-5


def test_separate_mode_has_the_gradient_of_the_sum_of_penalties(experiences, model, drive):
    stream, strategy, past = experiences(3), EWC(model=model(), penalty=5.0), []
    for e in stream:
        drive(strategy, [e])
        x, y = e.train.all()
        values = {name: p.detach().clone() for name, p in trainable(strategy.model).items()}
        past.append((fisher(strategy.model, x, y, 1), values))
    strategy.model.requires_grad_(True)
    with torch.no_grad():
        for p in strategy.model.parameters():
            p.add_(torch.randn_like(p))
    names = trainable(strategy.model)
    held = quadratic(list(names.values()), strategy.importance.of(names), strategy.centre.of(names))
    found = torch.autograd.grad(held, list(names.values()))
    for (name, p), g in zip(names.items(), found, strict=True):
        expected = torch.zeros_like(p)
        for importance, values in past:
            rows = tuple(slice(n) for n in values[name].shape)
            expected[rows] += 2 * importance[name] * (p[rows] - values[name])
        torch.testing.assert_close(g, expected.detach())


def test_online_mode_keeps_one_decayed_penalty_around_the_last_weights(experiences, model, drive):
    stream = experiences(2)
    strategy = drive(EWC(model=model(), mode="online", online_decay=0.5), stream[:1])
    first = {name: strategy.importance.of([name])[0].clone() for name in trainable(strategy.model)}
    drive(strategy, stream[1:])
    x, y = stream[1].train.all()
    new = fisher(strategy.model, x, y, 1)
    for name, p in trainable(strategy.model).items():
        rows = tuple(slice(n) for n in first[name].shape)
        new[name][rows] += 0.5 * first[name]
        torch.testing.assert_close(strategy.importance.of([name])[0], new[name])
        assert torch.equal(strategy.centre.of([name])[0], p)


def test_zero_penalty_is_naive(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(EWC(model=model(), penalty=0), stream).model, drive(Naive(model=model()), stream).model)


def test_important_weights_are_held(experiences, model, drive):
    stream, moved = experiences(2), []
    for weight in (0.0, 20.0):
        strategy = drive(EWC(model=model(), penalty=weight), stream[:1], epochs=5)
        names = trainable(strategy.model)
        start = [p.detach().clone() for p in names.values()]
        importance = [f.clone() for f in strategy.importance.of(names)]
        assert all(f.max() > 0 for f in importance)
        drive(strategy, stream[1:], epochs=5)
        after = [p[: len(s)] for p, s in zip(trainable(strategy.model).values(), start, strict=True)]
        moved.append(quadratic(after, importance, start).item())
    assert moved[1] < 0.3 * moved[0]


def test_new_rows_are_free(experiences, model, drive):
    stream = experiences(2)
    strategy = drive(EWC(model=model()), stream[:1])
    strategy.grow(stream[1])
    assert (strategy.importance.of(["head.weight"])[0][2:] == 0).all()
    assert (strategy.importance.of(["head.weight"])[0][:2] > 0).any()


def test_fisher_leaves_the_model_training_and_without_gradients(experiences, model, drive):
    strategy = drive(EWC(model=model()), experiences(1))
    assert strategy.training
    assert all(p.grad is None for p in strategy.parameters())


@pytest.mark.parametrize("mode", ["separate", "online"])
def test_resumes(experiences, model, resumes, mode):
    assert resumes(lambda: EWC(model=model(), mode=mode), experiences())


def test_refuses_what_is_out_of_range(model):
    with pytest.raises(UserError, match=r"online_decay: 2 is out of range \(valid: in \[0, 1\]\)"):
        EWC(model=model(), online_decay=2)
