"""SLCA by itself: rates, moments and the aligned classifier, by NumPy."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from clplat.backbones.base import Classifier
from clplat.backbones.heads import NCM, Growing, Taskwise
from clplat.backbones.mlp import mlp
from clplat.components.gaussians import Gaussians
from clplat.errors import UserError
from clplat.strategies.slca import SLCA, over_norms


def make(head=Growing, **options):
    torch.manual_seed(0)
    plain = {"lr": 0.05, "draws": 8, "align_epochs": 2}
    return SLCA(model=Classifier(mlp((5,), [7]), head(7, 6)).double(), **(plain | options))


def double(found):
    for e in found:
        object.__setattr__(e, "train", dataclasses.replace(e.train, inputs=e.train.inputs.double()))
    return found


def phi(strategy, data):
    with torch.no_grad():
        return strategy.eval().model.features(data.all()[0]).numpy()


def test_moments_are_those_of_the_features():
    draw = torch.Generator().manual_seed(1)
    f, y = 5 + torch.randn(20, 4, generator=draw), torch.arange(20) % 3
    found = Gaussians(4)
    found.grow(2)
    found.grow(4)
    for part in (slice(0, 7), slice(7, 20)):
        found.add(f[part], y[part])
    for c in range(3):
        mean, root = found.moments(c)
        own = f[y == c].double().numpy()
        assert np.abs(mean.numpy() - own.mean(0)).max() < 1e-12
        assert np.abs((root @ root.T).numpy() - np.cov(own.T)).max() < 1e-10
    found.add(f[:1], torch.tensor([3]))
    assert not found.moments(3)[1].abs().max() > 1e-6  # of one sample


def test_logits_are_divided_by_the_mean_norm_of_tasks():
    z = np.random.default_rng(0).normal(size=(4, 5))
    nu = (np.linalg.norm(z[:, :2], axis=1) + np.linalg.norm(z[:, 2:], axis=1) + 2e-7) / 2
    assert np.abs(over_norms(torch.from_numpy(z), [2, 3]).numpy() - z / nu[:, None]).max() < 1e-12
    assert not over_norms(torch.zeros(1, 5), [2, 3]).any()


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_the_backbone_learns_at_a_share_of_the_rate(experiences, optimizer):
    strategy = make(backbone_rate=0.1, optimizer=optimizer, weight_decay=0.01)
    strategy.grow(experiences(1)[0])
    found = {id(p): g["lr"] for g in strategy.configure_optimizers().param_groups for p in g["params"]}
    assert {found[id(p)] for p in strategy.model.head.parameters()} == {0.05}
    assert {found[id(p)] for p in strategy.model.backbone.parameters()} == {0.05 * 0.1}
    assert all(g["weight_decay"] == 0.01 for g in strategy.configure_optimizers().param_groups)
    strategy.model.backbone.requires_grad_(False)
    assert [g["lr"] for g in strategy.configure_optimizers().param_groups] == [0.05]


def align(strategy, start, features, tau):
    """The head, weight (4, 7) and bias (4,), after the alignment on drawn features: SGD with momentum, in NumPy."""
    w, b = start[0].copy(), start[1].copy()
    velocity = [np.zeros_like(w), np.zeros_like(b)]
    draw = torch.Generator().manual_seed(int(strategy.seed) + 1)
    means = [f.mean(0) for f in features]
    roots = [strategy.gaussians.moments(c)[1].numpy() for c in range(4)]  # checked above
    for epoch in range(2):
        lr = 0.05 * (1 + math.cos(math.pi * epoch / 2)) / 2
        z = torch.randn(4, 8, 7, generator=draw).double().numpy()
        f = np.concatenate([m + one @ r.T for m, one, r in zip(means, z, roots, strict=True)])
        y = np.repeat(np.arange(4), 8)
        for part in torch.randperm(32, generator=draw).split(8):
            x, t = f[part.numpy()], y[part.numpy()]
            wt, bt = (torch.from_numpy(a).requires_grad_() for a in (w, b))
            logits = torch.from_numpy(x) @ wt.T + bt
            if tau:
                norms = (logits[:, :2].norm(dim=1) + logits[:, 2:].norm(dim=1) + 2e-7) / 2
                logits = logits / norms[:, None] / tau
            loss = -logits.log_softmax(1)[torch.arange(8), torch.from_numpy(t)].mean()
            for i, (value, g) in enumerate(zip((w, b), torch.autograd.grad(loss, (wt, bt)), strict=True)):
                velocity[i] = 0.9 * velocity[i] + g.numpy()
                value -= lr * velocity[i]
    return w, b


@pytest.mark.parametrize("tau", [None, 0.5])
def test_the_classifier_is_aligned_on_gaussian_features(experiences, drive, tau):
    stream, seen = double(experiences(2)), {}
    strategy = make(temperature=tau, backbone_rate=1e-9)  # so slow that features of both are of one backbone
    inner = strategy._align

    def noted(index):
        seen["start"] = [p.detach().numpy().copy() for p in strategy.model.head.parameters()]
        inner(index)

    strategy._align = noted
    drive(strategy, stream[:1])
    assert not seen  # a single task has nothing to be aligned with
    features = [phi(strategy, stream[0].train)[k : k + 12] for k in (0, 12)]
    drive(strategy, stream[1:])
    features += [phi(strategy, stream[1].train)[k : k + 12] for k in (0, 12)]
    expected = align(strategy, seen["start"], features, tau)
    for found, value in zip(strategy.model.head.parameters(), expected, strict=True):
        assert np.abs(found.detach().numpy() - value).max() < 1e-9
        assert found.grad is None


def test_the_next_experience_goes_on_from_the_head_before_it_was_aligned(experiences, drive):
    stream, strategy = double(experiences(3)), make()
    plain = drive(make(align_epochs=0), stream[:2])
    drive(strategy, stream[:2])
    assert not torch.equal(strategy.model.head.weight, plain.model.head.weight)
    strategy.grow(stream[2])
    strategy.begin(stream[2])
    torch.testing.assert_close(strategy.model.head.weight[:4], plain.model.head.weight, rtol=0, atol=0)


def test_weights_of_a_run_that_it_starts_from_stay(experiences):
    """Nothing was aligned yet, so that there is nothing to go back to."""
    strategy = make()
    strategy.grow(experiences(1)[0])
    torch.nn.init.ones_(strategy.model.head.weight)
    strategy.begin(experiences(1)[0])
    assert (strategy.model.head.weight == 1).all()


def test_the_loss_is_over_the_classes_of_the_experience(experiences):
    stream, strategy = double(experiences(2)), make()
    for e in stream:
        strategy.grow(e)
    x, y = stream[1].train.all()
    strategy.global_batch = len(x)
    z = strategy.model(x)[:, 2:].detach().numpy()
    expected = (np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y.numpy() - 2]).mean()
    assert strategy.training_step((x, y), 0).item() == pytest.approx(expected, abs=1e-12)


def test_resumes(experiences, resumes):
    assert resumes(make, double(experiences(3)))


@pytest.mark.parametrize("head", [NCM, Taskwise])
def test_refuses_heads_that_do_not_predict_by_their_rows(head):
    with pytest.raises(UserError, match=f"head: {head.__name__.lower()} does not predict by one row a class"):
        make(head=head)


@pytest.mark.parametrize(
    "wrong", [{"backbone_rate": 0.0}, {"temperature": 0.0}, {"draws": 0}, {"align_epochs": -1}, {"chunk": 0}]
)
def test_refuses_what_is_out_of_range(wrong):
    with pytest.raises(UserError, match=rf"strategy.{next(iter(wrong))}: .* is out of range"):
        make(**wrong)
