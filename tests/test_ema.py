"""Frozen and slow copies: limits, growth, batch-norm statistics, precision, state."""

import copy

import pytest
import torch
from torch import nn

from clplat import Experience, Kind
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing, Masked
from clplat.backbones.mlp import mlp
from clplat.components.ema import EMA, Frozen
from clplat.errors import UserError


def walk(ema, model, steps=5):
    """Move the model at random, updating the copy; returns all weights passed."""
    path = [model.weight.detach().clone()]
    for _ in range(steps):
        with torch.no_grad():
            model.weight.add_(torch.randn_like(model.weight))
        ema.update(model)
        path.append(model.weight.detach().clone())
    return torch.stack(path)


def test_decay_zero_is_the_model():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.0)
    walk(ema, model)
    assert torch.equal(ema.model.weight, model.weight)


def test_decay_one_is_the_plain_mean():
    model = nn.Linear(3, 2)
    ema = EMA(model, 1.0)
    path = walk(ema, model)
    torch.testing.assert_close(ema.model.weight, path.mean(0))


def test_decay_one_without_warmup_never_moves():
    model = nn.Linear(3, 2)
    ema = EMA(model, 1.0, warmup=False)
    path = walk(ema, model)
    assert torch.equal(ema.model.weight, path[0])


def test_a_fixed_decay_by_hand():
    model = nn.Linear(1, 1)
    ema = EMA(model, 0.75, warmup=False)
    path = walk(ema, model, steps=2)
    torch.testing.assert_close(ema.model.weight, 0.75 * (0.75 * path[0] + 0.25 * path[1]) + 0.25 * path[2])


def test_batch_norm_statistics_are_copied_and_the_slow_pass_changes_none():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    ema = EMA(model, 0.9)
    model.train()
    ema.train()
    model(torch.randn(8, 3) + 5)
    ema.update(model)
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)
    assert ema.model[1].num_batches_tracked == 1
    ema(torch.randn(8, 3))
    assert torch.equal(ema.model[1].running_mean, model[1].running_mean)


def test_no_gradient_and_no_training_mode():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.9)
    holder = nn.ModuleList([model, ema]).train()
    assert holder.training
    assert not ema.model.training
    assert not ema(torch.randn(2, 3)).requires_grad
    assert [p.requires_grad for p in holder.parameters()] == [True, True, False, False]
    assert model.weight.requires_grad


def test_it_grows_with_the_model_and_keeps_what_it_knew():
    model = Classifier(mlp((3,), [4]), Growing(4, 6))
    model.grow(Experience(0, "a", Kind.LEARN, None, classes=(0, 1)))
    ema = EMA(model, 0.9)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    ema.update(model)
    before = copy.deepcopy(ema.model.state_dict())
    model.grow(Experience(1, "b", Kind.LEARN, None, classes=(2, 3)))
    ema.grow(model)
    assert torch.equal(ema.model.head.weight[:2], before["head.weight"])
    assert torch.equal(ema.model.head.weight[2:], model.head.weight[2:])
    assert torch.equal(ema.model.backbone.net[0][0].weight, before["backbone.net.0.0.weight"])
    assert not any(p.requires_grad for p in ema.parameters())
    assert ema(torch.randn(2, 3)).shape == (2, 4)
    ema.update(model)


def test_half_precision_is_averaged_in_float32():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    ema = EMA(model, 0.999, warmup=False)
    start = ema.model.weight.clone()
    with torch.no_grad():
        model.weight.add_(1)
    ema.update(model)
    assert ema.model.weight.dtype == torch.float32
    torch.testing.assert_close(ema.model.weight - start, torch.full((2, 3), 1e-3), rtol=0.02, atol=1e-5)
    assert ema(torch.ones(1, 3, dtype=torch.bfloat16)).dtype == torch.float32


def test_state_round_trip_goes_on_alike():
    model = nn.Linear(3, 2)
    ema = EMA(model, 0.999)
    walk(ema, model)
    other = EMA(nn.Linear(3, 2), 0.999)
    other.load_state_dict(ema.state_dict(), strict=True)
    ema.update(model)
    other.update(model)
    assert torch.equal(ema.model.weight, other.model.weight)


def test_frozen_copies_back():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    start = copy.deepcopy(model.state_dict())
    frozen = Frozen(model)
    with torch.no_grad():
        model[0].weight.zero_()
    model(torch.randn(8, 3))
    frozen.copy_to(model)
    assert all(torch.equal(v, start[k]) for k, v in model.state_dict().items())


def test_it_takes_the_classes_met_from_the_model():
    model = Classifier(mlp((4,), hidden=[3]), Masked(3, 4))
    first = Frozen(model)
    model.grow(Experience(0, "a", Kind.LEARN, train=None, classes=(0, 1)))
    first.grow(model)
    first.copy_to(model)
    assert model.head.seen.tolist() == [True, True, False, False]


def test_refuses_decay_above_one():
    with pytest.raises(UserError, match=r"decay: 1.5 is out of range \(valid: in \[0, 1\]\)"):
        EMA(nn.Linear(1, 1), 1.5)
