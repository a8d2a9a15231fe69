"""EATA against a float64 reference.

Against the authors' code (mr-eggplant/EATA f739b36, run apart, ResNet-20, four updates with SGD, Fisher term included):
largest difference of weights and predictions 1.7e-9 and 3.2e-8 in float64.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from tta import CLASSES, SGD, batch_statistics, cnn, entropy, experience, images, started, step

from clplat import Data, Kind
from clplat.errors import UserError
from clplat.strategies.eata import EATA


def make(**options):
    return EATA(model=cnn(), **{"margin": 0.8, "redundancy": 0.9, "fisher_weight": 0.0, **SGD, **options})


def norms(model):
    return [p for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]


def learned(count=70, **options):
    """After a learn experience that changed nothing: the source images are there, the weights are `cnn`'s."""
    mine = make(**options)
    data = Data(images(count, seed=3), torch.arange(count) % CLASSES)
    mine.grow(experience(kind=Kind.LEARN, train=data))
    mine.begin(experience(kind=Kind.LEARN, train=data))
    mine.end(experience(kind=Kind.LEARN, train=data))
    return mine, data.inputs


def test_fisher_information_is_the_mean_squared_gradient_of_batches():
    mine, x = learned(fisher_weight=1.0)
    plain, totals = batch_statistics(cnn()), 0
    for batch in x.split(64):
        logits = plain(batch)
        gradients = torch.autograd.grad(F.cross_entropy(logits, logits.argmax(1)), norms(plain))
        totals = totals + torch.cat([g.flatten() ** 2 for g in gradients])
    started(mine, 1)
    ours = torch.cat([f.flatten() for f in mine._fishers()])
    torch.testing.assert_close(ours, totals / 2, atol=1e-12, rtol=1e-8)


def test_updates_agree_with_the_reference():
    mine, _ = learned(fisher_weight=3.0)
    optimizer, plain = started(mine, 1), batch_statistics(cnn())
    mine_fisher = [f.clone() for f in mine._fishers()]
    adapted, source = norms(plain), [p.detach().clone() for p in norms(plain)]
    velocity, mean, limit, chosen = [torch.zeros_like(p) for p in adapted], None, 0.8 * math.log(CLASSES), []
    for number in range(5):
        x = images(12, seed=20 + number)
        prediction, stepped = step(mine, optimizer, x)
        logits = plain(x)
        torch.testing.assert_close(prediction, logits.detach(), atol=1e-9, rtol=0)
        loss, taken = 0, []
        for row, h in zip(logits, entropy(logits), strict=True):  # sample by sample, as the paper writes it
            p = row.softmax(0).detach()
            new = mean is None or abs(float(p @ mean / (p.norm() * mean.norm()))) < 0.9
            if h < limit and new:
                loss, taken = loss + (limit - h.detach()).exp() * h, [*taken, p]
        chosen.append(len(taken))
        assert stepped == bool(taken)
        if not taken:
            continue
        batch_mean = torch.stack(taken).mean(0)
        mean = batch_mean if mean is None else 0.9 * mean + 0.1 * batch_mean
        pull = sum((f * (p - s) ** 2).sum() for f, p, s in zip(mine_fisher, adapted, source, strict=True))
        for p, v, g in zip(
            adapted, velocity, torch.autograd.grad(loss / len(taken) + 3.0 * pull, adapted), strict=True
        ):
            v.mul_(0.9).add_(g)
            p.data -= 0.05 * v
    for a, b in zip(mine.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-9, rtol=0)
    assert chosen[0] > 0
    assert min(chosen) < 12  # both filters had something to do
    torch.testing.assert_close(mine.kept["mean"], mean, atol=1e-9, rtol=0)


def test_nothing_reliable_is_no_step():
    mine = make(margin=1e-6)
    optimizer, before = started(mine), [p.clone() for p in mine.model.parameters()]
    assert step(mine, optimizer, images())[1] is False
    assert all(torch.equal(a, b) for a, b in zip(before, mine.model.parameters(), strict=True))
    assert mine.kept["mean"] is None


def test_the_fisher_term_needs_source_images():
    with pytest.raises(UserError, match=r"strategy\.fisher_weight: 1\.0 needs source images.*0, which is ETA"):
        started(EATA(model=cnn()))  # the paper's method is the default
