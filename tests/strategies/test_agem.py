import numpy as np
import pytest
import torch

from clplat.backbones.heads import Linear
from clplat.components.gradients import as_vector, overwrite, second_gradient
from clplat.errors import UserError
from clplat.strategies.agem import AGEM, projected
from clplat.strategies.naive import Naive


def test_the_projection_by_hand():
    g, r = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 3.0])
    assert projected(g, r).tolist() == [1.0, 0.0]  # what went against r is gone
    assert projected(g, -r).tolist() == [1.0, -2.0]
    assert projected(g, 0 * r).tolist() == [1.0, -2.0]


def reference_gradient(weight, bias, x, y):
    """Of the mean cross-entropy of a linear model, weights first, bias last."""
    z = x @ weight.T + bias
    p = np.exp(z - z.max(1, keepdims=True))
    d = (p / p.sum(1, keepdims=True) - np.eye(len(bias))[y]) / len(y)
    return np.concatenate([(d.T @ x).ravel(), d.sum(0)])


@pytest.mark.parametrize("against", [True, False])
def test_a_step_by_an_independent_reference(model, against):
    strategy = AGEM(model=model(Linear, hidden=()), memory=6, replay_batch=3, lr=0.1).double()
    held, x = torch.ones(1, 5, dtype=torch.float64), torch.ones(4, 5, dtype=torch.float64) + 0.1 * torch.randn(4, 5)
    label = torch.tensor([1])
    strategy.memory.add(held, label, rows=label)
    strategy.raw, y = x, torch.full((4,), 2 if against else 1)
    head, optimizer = strategy.model.head, strategy.configure_optimizers()
    w, b = head.weight.detach().numpy().copy(), head.bias.detach().numpy().copy()
    strategy.training_step((x, y), 0).backward()
    strategy.on_before_optimizer_step(optimizer)
    optimizer.step()
    g = reference_gradient(w, b, x.numpy(), y.numpy())
    r = reference_gradient(w, b, held.numpy(), label.numpy())
    assert (g @ r < 0) == against
    if against:
        g = g - (g @ r) / (r @ r) * r
    moved = np.concatenate([(head.weight.detach().numpy() - w).ravel(), head.bias.detach().numpy() - b])
    np.testing.assert_allclose(moved, -0.1 * g, rtol=0, atol=1e-10)


def test_vectors_go_back_to_where_they_came_from(model):
    net = model(Linear)
    parameters = [*net.parameters(), torch.nn.Parameter(torch.ones(2))]  # the loss does not depend on the last
    loss = net(torch.randn(3, 5)).square().sum()
    found = second_gradient(loss, parameters, 1)
    assert all(p.grad is None for p in parameters)
    net(torch.randn(3, 5)).sum().backward()
    overwrite(parameters, found)
    assert torch.equal(as_vector(parameters), found)
    assert parameters[-1].grad.tolist() == [0.0, 0.0]


def test_the_first_experience_is_naive(experiences, model, drive, equal):
    stream = experiences(1)
    assert equal(drive(AGEM(model=model()), stream).model, drive(Naive(model=model()), stream).model)


def test_only_earlier_experiences_are_remembered(experiences, model, drive):
    strategy, seen = AGEM(model=model(), memory=12), []
    drive(strategy, experiences(2), each_step=lambda s: seen.append(sorted(s.memory.seen)))
    assert [list(s) for s in dict.fromkeys(map(tuple, seen))] == [[], [0, 1]]
    assert strategy.memory.held == dict.fromkeys(range(4), 3)


def test_no_step_goes_against_the_memory(experiences, model, drive, monkeypatch):
    cosines = []

    def noted(g, r):
        made = projected(g, r)
        cosines.append([(v @ r / (v.norm() * r.norm())).item() for v in (g, made)])
        return made

    monkeypatch.setattr("clplat.strategies.agem.projected", noted)
    drive(AGEM(model=model()), experiences(2))
    assert min(before for before, _ in cosines) < -0.1
    assert min(after for _, after in cosines) > -1e-4  # 0 but for rounding, in single precision


def test_accumulated_batches_are_projected_once(experiences, model, drive, monkeypatch):
    calls = []
    monkeypatch.setattr("clplat.strategies.agem.projected", lambda g, r: calls.append(1) or projected(g, r))
    strategy = drive(AGEM(model=model()), experiences(2), epochs=1, batch=6, accumulate=2)
    assert len(calls) == 2  # the second experience's 24 samples
    assert strategy._reference is None


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: AGEM(model=model(), memory=9, replay_batch=4), experiences())


def test_refuses_to_remember_nothing(model):
    with pytest.raises(UserError, match=r"replay_batch: 0 is out of range \(valid: ≥ 1\)"):
        AGEM(model=model(), replay_batch=0)
