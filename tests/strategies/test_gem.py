import itertools

import numpy as np
import pytest
import torch

from clplat.backbones.heads import Linear
from clplat.errors import UserError
from clplat.strategies.gem import GEM, nearest
from clplat.strategies.naive import Naive


def brute(g, rows, margin):
    """The program's solution by trying every set of constraints that may be active: g + Gᵀ v, v ≥ margin."""
    if (rows @ g >= 0).all():
        return g
    best, value = None, np.inf
    for free in itertools.product([False, True], repeat=len(rows)):
        free = np.array(free)
        v = np.full(len(rows), margin)
        if free.any():
            fixed = g + v[~free] @ rows[~free]
            v[free] = np.linalg.lstsq(rows[free].T, -fixed, rcond=None)[0]
        made = g + v @ rows
        if (v >= margin - 1e-12).all() and made @ made < value - 1e-12:
            best, value = made, made @ made
    return best


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_the_program_by_an_independent_reference(margin):
    generator = np.random.default_rng(0)
    replaced = 0
    for trial in range(40):
        g, rows = generator.standard_normal(6), generator.standard_normal((1 + trial % 4, 6))
        found, expected = nearest(torch.from_numpy(g), torch.from_numpy(rows), margin).numpy(), brute(g, rows, margin)
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10)
        assert margin or (rows @ found > -1e-10).all()
        replaced += found is not g and not np.array_equal(found, g)
    assert replaced > 20


def test_references_that_say_the_same_are_one():
    g, r = torch.tensor([1.0, -2.0]).double(), torch.tensor([0.0, 3.0]).double()
    torch.testing.assert_close(
        nearest(g, torch.stack([r, 2 * r])), torch.tensor([1.0, 0.0]).double(), rtol=0, atol=1e-12
    )


def reference_gradient(weight, bias, x, y):
    """Of the mean cross-entropy of a linear model, weights first, bias last."""
    z = x @ weight.T + bias
    p = np.exp(z - z.max(1, keepdims=True))
    d = (p / p.sum(1, keepdims=True) - np.eye(len(bias))[y]) / len(y)
    return np.concatenate([(d.T @ x).ravel(), d.sum(0)])


def test_a_step_by_an_independent_reference(model):
    strategy = GEM(model=model(Linear, hidden=()), memory=8, margin=0.3, lr=0.1).double()
    held, labels, of = (
        torch.ones(6, 5).double() + torch.randn(6, 5) / 9,
        torch.tensor([1, 1, 0, 3, 3, 2]),
        [0, 0, 0, 1, 1, 1],
    )
    strategy.memory.add(held, torch.tensor(of), targets=labels, rows=labels)
    x, y = torch.ones(4, 5).double() + torch.randn(4, 5) / 9, torch.tensor([4, 5, 4, 5])
    head, optimizer = strategy.model.head, strategy.configure_optimizers()
    w, b = head.weight.detach().numpy().copy(), head.bias.detach().numpy().copy()
    strategy.training_step((x, y), 0).backward()
    strategy.on_before_optimizer_step(optimizer)
    optimizer.step()
    rows = [reference_gradient(w, b, held[s].numpy(), labels[s].numpy()) for s in (slice(0, 3), slice(3, 6))]
    g = reference_gradient(w, b, x.numpy(), y.numpy())
    assert (np.stack(rows) @ g < 0).any()
    moved = np.concatenate([(head.weight.detach().numpy() - w).ravel(), head.bias.detach().numpy() - b])
    np.testing.assert_allclose(moved, -0.1 * brute(g, np.stack(rows), 0.3), rtol=0, atol=1e-10)


def test_the_first_experience_is_naive(experiences, model, drive, equal):
    stream = experiences(1)
    assert equal(drive(GEM(model=model()), stream).model, drive(Naive(model=model()), stream).model)


def test_each_earlier_experience_has_its_room(experiences, model, drive):
    strategy, seen = GEM(model=model(), memory=12), []
    drive(strategy, experiences(), each_step=lambda s: seen.append(sorted(s.memory.held)))
    assert [list(s) for s in dict.fromkeys(map(tuple, seen))] == [[], [0], [0, 1]]
    _, of, labels, _ = strategy.memory.everything()
    assert torch.equal(labels // 2, of)
    assert strategy.memory.held == {0: 4, 1: 4, 2: 4}


def test_accumulated_batches_are_replaced_once(experiences, model, drive, monkeypatch):
    calls = []
    monkeypatch.setattr("clplat.strategies.gem.nearest", lambda *a: calls.append(len(a[1])) or nearest(*a))
    drive(GEM(model=model()), experiences(), epochs=1, batch=6, accumulate=2)
    assert calls == [1, 1, 2, 2]


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: GEM(model=model(), memory=9), experiences())


def test_refuses_a_negative_margin(model):
    with pytest.raises(UserError, match=r"margin: -1 is out of range \(valid: ≥ 0\)"):
        GEM(model=model(), margin=-1)
