"""EASE by itself: prototypes, those made up, and the weighed cosines, class by class in NumPy."""

import dataclasses

import numpy as np
import pytest
import torch

from clplat import Data, Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing
from clplat.backbones.mlp import mlp
from clplat.errors import UserError
from clplat.strategies.ease import EASE, completed, weights

PLAIN = {"where": "ffn", "projections": [], "rank": 2, "alpha": 2.0, "dropout": 0.0, "optimizer": "sgd", "lr": 0.05}


def make(**options):
    torch.manual_seed(0)
    return EASE(model=Classifier(mlp((5,), [9, 6]), Growing(6, 6)).double(), **(PLAIN | options))


def double(found):
    for e in found:
        object.__setattr__(e, "train", dataclasses.replace(e.train, inputs=e.train.inputs.double()))
    return found


def cos(a, b):
    return a @ b / (np.linalg.norm(a) * np.linalg.norm(b))


def features(strategy, x, j):
    """φ_j by the plain weights and adapter j alone."""
    h = x.numpy()
    for name, layer in strategy.adapters.base_layers().items():
        a, b = (t.detach().numpy() for t in strategy.adapters.factors(f"task{j}")[name])
        h = np.maximum(h @ (layer.weight.detach().numpy() + b @ a).T + layer.bias.detach().numpy(), 0)
    return h


def reference(strategy, stream, probe, a):
    """Logits (n, C): everything as the paper says it, one class and one space at a time."""
    tasks, classes = len(stream), 2 * len(stream)
    mean = {}
    for c in range(classes):
        x, y = stream[c // 2].train.all()
        for j in range(c // 2 + 1):
            mean[c, j] = features(strategy, x[y == c], j).mean(0)
    for c in range(classes):
        home = c // 2
        for j in range(home + 1, tasks):
            have = [k for k in range(classes) if k // 2 >= j]
            w = np.exp([cos(mean[c, home], mean[k, home]) for k in have])
            mean[c, j] = sum(x * mean[k, j] for x, k in zip(w / w.sum(), have, strict=True))
    phi = [features(strategy, probe, j) for j in range(tasks)]
    out = np.zeros((len(probe), classes))
    for n in range(len(probe)):
        for c in range(classes):
            each = [cos(phi[j][n], mean[c, j]) for j in range(tasks)]
            rest = [x for j, x in enumerate(each) if j != c // 2]
            out[n, c] = each[c // 2] + (a * np.mean(rest) if rest else 0)
    return out


@pytest.mark.parametrize("count", [1, 3])
def test_predictions_are_the_papers_to_double_precision(experiences, drive, count):
    stream = double(experiences(count))
    strategy = drive(make(others=0.3), stream)
    assert all(b.abs().max() > 1e-3 for _, b in strategy.adapters.factors(f"task{count - 1}").values())
    probe = torch.randn(9, 5, dtype=torch.float64)
    found = strategy.eval().predict(probe).detach().numpy()
    assert np.abs(found[:, : 2 * count] - reference(strategy, stream, probe, 0.3)).max() < 1e-10
    assert np.isneginf(found[:, 2 * count :]).all()  # classes not met


def test_weights_of_spaces():
    found = weights(torch.tensor([0, 2, 1]), 3, 0.1)
    expected = torch.tensor([[1, 0.05, 0.05], [0.05, 0.05, 1], [0.05, 1, 0.05]], dtype=torch.float64)
    torch.testing.assert_close(found, expected)
    assert torch.equal(weights(torch.tensor([0]), 1, 0.1), torch.ones(1, 1, dtype=torch.float64))


def test_what_was_measured_is_not_made_up():
    means, met = torch.randn(2, 3, 4, dtype=torch.float64), torch.tensor([[True, True, True], [False, True, True]])
    found = completed(means, met, torch.tensor([0, 1, 1]))
    assert torch.equal(found[0], means[0])
    assert torch.equal(found[1, 1:], means[1, 1:])
    w = np.exp([cos(means[0, 0].numpy(), means[0, k].numpy()) for k in (1, 2)])
    expected = (w[0] * means[1, 1] + w[1] * means[1, 2]) / w.sum()
    torch.testing.assert_close(found[1, 0], expected, rtol=0, atol=1e-12)


def test_each_experience_trains_its_adapter_alone(experiences, drive):
    stream, strategy = double(experiences(3)), make()
    drive(strategy, stream[:2])
    before = [p.clone() for name in ("task0", "task1") for p in strategy.adapters.parameters_of(name)]
    drive(strategy, stream[2:])
    after = [p for name in ("task0", "task1") for p in strategy.adapters.parameters_of(name)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert strategy.adapters.active == strategy.adapters.trained == ("task2",)
    assert any(b.any() for _, b in strategy.adapters.factors("task2").values())


def test_a_class_that_comes_again_adds_to_its_prototypes(experiences, drive):
    stream = double(experiences(2))
    again = Experience(2, "again", Kind.LEARN, stream[0].train, classes=(0, 1))
    strategy = drive(make(), [*stream, again])
    first, *later = [s.counts.tolist() for s in strategy.spaces]
    assert first == [24, 24, 12, 12, 0, 0]
    assert later == [[12, 12, 12, 12, 0, 0], [12, 12, 0, 0, 0, 0]]
    assert strategy.home.tolist() == [0, 0, 1, 1, -1, -1]
    assert strategy.eval().predict(stream[0].train.all()[0])[:, :4].isfinite().all()


def test_before_the_first_experience_is_over_the_head_predicts(experiences):
    (e,), x = double(experiences(1)), torch.randn(3, 5, dtype=torch.float64)
    strategy = make()
    strategy.grow(e)
    assert torch.equal(strategy.predict(x), strategy.model.predict(x))
    strategy.end(e)
    assert strategy.predict(x)[:, :2].abs().max() <= 1 + 1e-9  # cosines
    strategy.grow(Experience(1, "next", Kind.LEARN, None, classes=(2, 3)))
    assert strategy.predict(x)[:, 2:].isneginf().all()  # until it is over


def test_the_loss_is_over_the_classes_of_the_experience(experiences):
    stream, strategy = double(experiences(2)), make()
    for e in stream:
        strategy.grow(e)
    x, y = stream[1].train.all()
    strategy.global_batch = len(x)
    z = strategy.model(x)[:, 2:].detach().numpy()
    expected = (np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y.numpy() - 2]).mean()
    assert strategy.training_step((x, y), 0).item() == pytest.approx(expected, abs=1e-12)


def test_prototypes_are_of_data_without_augmentation(experiences):
    (e,), ends = double(experiences(1)), []
    for shift in (0, 5):
        strategy = make()
        strategy._prepare = lambda x, train, shift=shift: x + shift if train else x
        strategy.train()
        strategy.grow(e)
        strategy.end(e)
        ends.append(strategy.spaces[0].totals)
    assert torch.equal(*ends)
    assert isinstance(e.train, Data)


def test_resumes(experiences, resumes):
    assert resumes(make, double(experiences(3)))


@pytest.mark.parametrize("wrong", [{"others": -0.1}, {"chunk": 0}])
def test_refuses_what_is_out_of_range(wrong):
    with pytest.raises(UserError, match=rf"strategy.{next(iter(wrong))}: .* is out of range"):
        make(**wrong)


def test_a_prototype_is_made_up_from_the_space_that_its_class_was_first_met_in():
    """Class 0 was met again in space 1, where class 2 would stand in for it in space 2."""
    torch.manual_seed(0)
    means = torch.randn(3, 4, 5, dtype=torch.float64)
    met = torch.tensor([[1, 1, 0, 1], [1, 0, 1, 0], [0, 1, 1, 1]], dtype=torch.bool)
    found = completed(means, met, torch.tensor([0, 0, 1, 0]))
    likeness = torch.tensor([cos(means[0, 0].numpy(), means[0, k].numpy()) for k in (1, 3)])
    torch.testing.assert_close(found[2, 0], likeness.softmax(0) @ means[2, [1, 3]])
