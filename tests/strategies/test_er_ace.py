import numpy as np
import pytest
import torch

from clplat.backbones.heads import Linear
from clplat.errors import UserError
from clplat.strategies.er_ace import ERACE


def reference(z, y, allowed):
    """Mean cross-entropy of logits z (n, C), each over the classes `allowed`, and its gradient (n, C)."""
    e = np.exp(z[:, allowed])
    p = np.zeros_like(z)
    p[:, allowed] = e / e.sum(1, keepdims=True)
    rows = np.arange(len(y))
    return -np.log(p[rows, y]).mean(), (p - np.eye(z.shape[1])[y]) / len(y)


@pytest.fixture
def prepared(model):
    """In float64, with one remembered sample, so that it is known what is replayed; new samples are of classes 2, 4."""
    strategy = ERACE(model=model(Linear), memory=5, replay_batch=3).double()
    held = torch.randn(1, 5, dtype=torch.float64)
    strategy.memory.add(held, torch.tensor([1]))
    strategy.raw = torch.randn(4, 5, dtype=torch.float64)
    return strategy, held, torch.tensor([2, 4, 4, 2])


def test_loss_and_gradient_by_an_independent_reference(prepared):
    strategy, held, y = prepared
    loss = strategy.training_step((strategy.raw, y), 0)
    head = strategy.model.head
    found = torch.autograd.grad(loss, [head.weight, head.bias])
    with torch.no_grad():
        new, old = (strategy.model.features(x).numpy() for x in (strategy.raw, held.expand(3, 5)))
        w, b = head.weight.numpy(), head.bias.numpy()
    a, ga = reference(new @ w.T + b, y.numpy(), [2, 4])
    c, gc = reference(old @ w.T + b, np.array([1, 1, 1]), list(range(6)))
    assert abs(loss.item() - (a + c)) < 1e-10
    np.testing.assert_allclose(found[0].numpy(), ga.T @ new + gc.T @ old, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found[1].numpy(), ga.sum(0) + gc.sum(0), rtol=0, atol=1e-10)


def test_new_samples_leave_the_rows_of_absent_classes_alone(model):
    strategy = ERACE(model=model(Linear))
    strategy.raw = torch.randn(4, 5)
    strategy.training_step((strategy.raw, torch.tensor([2, 4, 4, 2])), 0).backward()
    moved = strategy.model.head.weight.grad.abs().sum(1) > 0
    assert moved.tolist() == [False, False, True, False, True, False]


def test_it_remembers(experiences, model, drive):
    stream = experiences()
    strategy = drive(ERACE(model=model(), memory=60, replay_batch=8), stream, epochs=20)
    accuracy = [(strategy.predict(x).argmax(1) == y).float().mean().item() for x, y in (e.train.all() for e in stream)]
    assert min(accuracy) > 0.6  # without memory it ends at 0


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: ERACE(model=model(), memory=9, replay_batch=4), experiences())


def test_refuses_to_replay_nothing(model):
    with pytest.raises(UserError, match=r"replay_batch: 0 is out of range \(valid: ≥ 1\)"):
        ERACE(model=model(), replay_batch=0)
