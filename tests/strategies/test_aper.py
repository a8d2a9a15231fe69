"""APER by itself: adapted once, frozen then, prototypes of features without and with the adapter."""

import numpy as np
import pytest
import torch

from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing
from clplat.backbones.mlp import mlp
from clplat.errors import UserError
from clplat.strategies.aper import APER
from clplat.stream import Stream

OPTIONS = {"where": "ffn", "projections": [], "rank": 2, "alpha": 2.0, "dropout": 0.0, "optimizer": "sgd", "lr": 0.05}


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return APER(model=Classifier(mlp((5,), [7, 6]), Growing(6, 6)).to(dtype), **{**OPTIONS, **options})


def learn(strategy, experiences, epochs=3, start=0):
    """What the loop does, without an optimizer where nothing is trained."""
    losses = []
    for e in experiences:
        strategy.train()
        strategy.grow(e)
        if e.index < start:  # as a resume does: structure only
            continue
        strategy.begin(e)
        trained = [p for p in strategy.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.05) if trained else None
        for _ in range(epochs):
            for positions in torch.arange(len(e.train)).split(8):
                raw, labels = e.train.batch(positions)
                x = strategy.prepare(raw).to(next(strategy.model.parameters()).dtype)
                strategy.raw, strategy.global_batch = x, len(x)
                loss = strategy.training_step((x, labels), 0)
                losses.append(loss is not None)
                if loss is not None:
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        strategy.end(e)
    return losses


def double(experiences, count):
    """With inputs in double precision."""
    found = experiences(count)
    for e in found:
        object.__setattr__(e.train, "inputs", e.train.inputs.double())
    return found


def features(net, x, factors=None):
    """Of an MLP with rectifiers in NumPy, with a change s B A of each layer or without."""
    for k, (weight, bias) in enumerate(net):
        change = 0 if factors is None else factors[k]
        x = np.maximum(x @ (weight + change).T + bias, 0)
    return x


def test_predictions_are_the_papers_to_double_precision(experiences):
    stream, strategy = double(experiences, 2), make(torch.float64)

    learn(strategy, stream)
    bases = [(b.weight.detach().numpy(), b.bias.detach().numpy()) for b in strategy.adapters.base_layers().values()]
    change = [(b @ a).detach().numpy() for a, b in strategy.adapters.factors("first").values()]  # s = 2 / 2
    assert all(np.abs(c).max() > 1e-3 for c in change)
    x, y = (torch.cat(t).numpy() for t in zip(*(e.train.all() for e in stream), strict=True))
    probe = torch.randn(9, 5, dtype=torch.float64)
    both, asked = (np.hstack([features(bases, t), features(bases, t, change)]) for t in (x, probe.numpy()))
    means = np.stack([both[y == c].mean(0) for c in range(4)])
    expected = asked @ means.T / np.outer(np.linalg.norm(asked, axis=1), np.linalg.norm(means, axis=1))
    assert np.abs(strategy.eval().predict(probe).detach().numpy() - expected).max() < 1e-10


def test_only_the_first_experience_trains(experiences):
    stream, strategy = experiences(3), make()
    assert all(learn(strategy, stream[:1]))
    before = {k: v.clone() for k, v in strategy.state_dict().items() if "lora" in k or "backbone" in k}
    assert not any(learn(strategy, stream[1:]))
    assert not any(p.requires_grad for p in strategy.parameters())
    assert all(torch.equal(v, strategy.state_dict()[k]) for k, v in before.items())
    assert strategy.prototypes.counts.tolist() == [12] * 6


def test_until_the_first_experience_is_over_the_head_predicts(experiences):
    stream, strategy = experiences(1), make()
    strategy.grow(stream[0])
    x = torch.randn(3, 5)
    assert torch.equal(strategy.predict(x), strategy.model.predict(x))
    strategy.end(stream[0])
    assert strategy.predict(x).abs().max() <= 1 + 1e-6  # cosines


def test_prototypes_are_of_data_without_augmentation(experiences):
    stream, ends = experiences(1), []
    for augment in (None, lambda x: x + 5):
        strategy = make()
        strategy.grow(stream[0])
        strategy._prepare = Stream([], num_classes=6, input_shape=(5,), augment=augment).prepare
        strategy.train()
        strategy.end(stream[0])
        ends.append(strategy.prototypes.totals)
    assert torch.equal(*ends)


def test_resumes(experiences):
    stream, whole, other = experiences(3), make(), make()
    learn(whole, stream[:2])
    for e in stream[:2]:
        other.grow(e)
    other.load_state_dict(whole.state_dict())
    for strategy in (whole, other):
        learn(strategy, stream[2:])
    x = torch.randn(4, 5)
    assert torch.equal(whole.eval().predict(x), other.eval().predict(x))
    assert torch.equal(whole.prototypes.totals, other.prototypes.totals)


def test_refuses_what_is_out_of_range():
    with pytest.raises(UserError, match=r"strategy.chunk: 0 is out of range"):
        make(chunk=0)
