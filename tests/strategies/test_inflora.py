"""InfLoRA by itself: what each task may learn by, in NumPy and double precision, and what it then leaves alone."""

import dataclasses

import numpy as np
import pytest
import torch

from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing
from clplat.backbones.mlp import mlp
from clplat.errors import UserError
from clplat.strategies.inflora import InfLoRA, directions, extended

RANK = 2
PLAIN = {"where": "ffn", "projections": [], "rank": RANK, "optimizer": "sgd", "lr": 0.05, "tasks": 4}


def make(**options):
    torch.manual_seed(0)
    return InfLoRA(model=Classifier(mlp((6,), [7]), Growing(7, 6)).double(), **(PLAIN | options))


@pytest.fixture
def stream(experiences):
    found = experiences(3, features=6)
    for e in found:
        object.__setattr__(e, "train", dataclasses.replace(e.train, inputs=e.train.inputs.double()))
    return found


def inputs_of(e):
    """Inputs (n, d) of the layer that is adapted: those of the network, whatever was learned."""
    return e.train.all()[0].numpy()


def chosen(statistic, past, count):
    """Orthonormal directions (count, d) of the largest parts of `statistic` (d, m) outside `past` (k, d), in NumPy."""
    u, s, _ = np.linalg.svd(statistic - past.T @ (past @ statistic), full_matrices=False)
    return u.T[:count], s


def by_hand(stream, of, threshold):
    """For each task A (r, d) and, as it begins, an orthonormal basis (k, d) of what is left alone."""
    past, found = np.zeros((0, 6)), []
    for t, e in enumerate(stream):
        x = inputs_of(e)
        statistic = x.T if of == "inputs" else x.T @ x
        found.append((chosen(statistic, past, RANK)[0], past))
        for more in range(7):  # as many as it takes
            basis = np.concatenate([past, chosen(statistic, past, more)[0]])
            if ((basis @ statistic) ** 2).sum() >= (threshold + (1 - threshold) * t / 4) * (statistic**2).sum():
                break
        past = basis
    return [*found, (None, past)]


def factors(strategy, task):
    ((a, b),) = strategy.adapters.factors(f"task{task}").values()
    return a, b


@pytest.mark.parametrize(("of", "threshold"), [("covariance", 0.9), ("inputs", 0.7)])
def test_directions_and_what_is_left_alone_are_the_papers(of, threshold, stream, drive):
    expected, strategy = by_hand(stream, of, threshold), make(of=of, threshold=threshold)
    assert [len(past) for _, past in expected] == [0, 1, 2, 4]  # with a threshold that does not grow the last is 3
    for t in range(3):
        drive(strategy, stream[t : t + 1])
        a = factors(strategy, t)[0].detach().numpy()
        np.testing.assert_allclose(np.abs(a @ expected[t][0].T), np.eye(RANK), atol=1e-10)
        (space,) = strategy.spaces.values()
        np.testing.assert_allclose(space.numpy(), expected[t + 1][1].T @ expected[t + 1][1], atol=1e-10)
    assert strategy.measurements() == {"protected": pytest.approx(4 / 6)}


def test_outputs_and_gradients_are_the_papers(stream, drive):
    """The second task: both changes beside W, cross-entropy of its own classes, and no gradient for A."""
    strategy = drive(make(), stream[:1])
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    a, b = factors(strategy, 1)
    b.data.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(5), dtype=b.dtype))
    x, y = stream[1].train.all()
    strategy.global_batch = len(x)
    loss = strategy.training_step((x, y), 0)
    loss.backward()
    old, mine = factors(strategy, 0), b.detach().clone().requires_grad_()
    (layer,) = strategy.adapters.base_layers().values()
    weight = layer.weight.detach() + (old[1] @ old[0] + mine @ a).div(3**0.5)  # s = 1/√3, as in code
    h = (x @ weight.T + layer.bias.detach()).relu()
    logits = h @ strategy.model.head.weight.detach()[2:].T + strategy.model.head.bias.detach()[2:]
    expected = -logits.log_softmax(1)[torch.arange(len(y)), y - 2].mean()
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(b.grad, mine.grad, rtol=0, atol=1e-12)
    assert mine.grad.abs().max() > 0
    assert not any(p.requires_grad for p in (a, *old))


def test_inputs_are_those_by_the_weights_of_the_moment(stream, drive):
    """Of the second of two layers: A by the old weights, and what is left alone by those that were learned."""
    torch.manual_seed(0)
    strategy = InfLoRA(model=Classifier(mlp((6,), [7, 5]), Growing(5, 6)).double(), **PLAIN, threshold=1e-6)
    (first, second), x = strategy.adapters.layers, stream[0].train.all()[0]

    def leading(change):
        layer = strategy.adapters.base_layers()[first]
        h = (x @ (layer.weight.detach() + change).T + layer.bias.detach()).relu().numpy()
        return chosen(h.T, np.zeros((0, 7)), RANK)[0]

    before = leading(0.0)
    drive(strategy, stream[:1])
    after = leading(strategy.adapters.delta("task0")[first])
    a = strategy.adapters.factors("task0")[second][0].detach().numpy()
    np.testing.assert_allclose(np.abs(a @ before.T), np.eye(RANK), atol=1e-8)
    space = list(strategy.spaces.values())[1].numpy()
    np.testing.assert_allclose(space, np.outer(after[0], after[0]), atol=1e-8)  # the least share takes one direction
    assert np.abs(np.outer(before[0], before[0]) - space).max() > 1e-6


def test_a_task_changes_nothing_for_inputs_in_what_is_left_alone(stream, drive):
    flat = stream[0].train.inputs
    flat[:24, 2:] = 0.0  # the first task has two directions; all of them stay
    strategy = drive(make(threshold=1.0), stream[:1])
    before = strategy.model.features(flat[:24]).detach()
    drive(strategy, stream[1:])
    torch.testing.assert_close(strategy.model.features(flat[:24]), before, rtol=0, atol=1e-12)
    assert factors(strategy, 1)[1].any()
    assert not factors(strategy, 2)[0].any()  # the second has taken the other four: none is left
    assert strategy.measurements() == {"protected": pytest.approx(1.0)}


def test_a_direction_of_rounding_is_not_taken():
    c = torch.diag(torch.tensor([1.0, 0.5, 1e-9], dtype=torch.float64))
    past = torch.diag(torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))
    u, _ = directions(c, past, "covariance")
    torch.testing.assert_close(u, torch.tensor([[0.0, 1.0, 0.0]], dtype=torch.float64).T)
    torch.testing.assert_close(extended(c, past, 1.0, "covariance").diag().round(), (c.diag() > 1e-6).double())


def test_signs_do_not_depend_on_the_decomposition(monkeypatch):
    x = torch.randn(9, 4, dtype=torch.float64)
    found, plain = directions(x.T @ x, torch.zeros(4, 4).double(), "inputs")[0], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda m: (-plain(m).U, *plain(m)[1:]))
    assert torch.equal(directions(x.T @ x, torch.zeros(4, 4).double(), "inputs")[0], found)


def test_processes_share_the_samples(stream):
    """Each looks at its own part, by chunks; together they have all, in the order of the data."""
    strategy, parts = make(samples=None), []
    strategy.grow(stream[0])
    strategy.world_size = 2
    for strategy.rank in (0, 1):
        strategy._calibrate(stream[0], lambda _, x: parts.append(x), chunk=7, share=True)
    assert [len(part) for part in parts] == [7, 7, 7, 3]
    whole = torch.cat([parts[0], parts[2], parts[1], parts[3]])
    assert torch.equal(whole, stream[0].train.all()[0])


def test_resumes(stream, resumes):
    assert resumes(make, stream)


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 0), ("threshold", 0.0), ("threshold", 1.1), ("tasks", 0), ("of", "x"), ("chunk", 0), ("samples", 0)],
)
def test_refuses_values_out_of_range(option, value):
    with pytest.raises(UserError, match=rf"strategy.{option}: {value!r} is out of range"):
        make(**{option: value})
