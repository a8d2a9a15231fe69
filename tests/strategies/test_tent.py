"""TENT against a float64 reference.

Against the authors' code (DequanWang/tent e9e926a, run apart, ResNet-20, four updates with SGD): largest difference of
weights and predictions 2.2e-16 and 2.4e-15 in float64, 1.3e-6 and 8.3e-6 in float32.
"""

import torch
from tta import SGD, batch_statistics, cnn, entropy, images, moved, started, step, vit, weights

from clplat.strategies.tent import Tent


def test_updates_agree_with_the_reference():
    mine, plain = Tent(model=cnn(), **SGD), batch_statistics(cnn())
    norms = [p for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    optimizer, velocity = started(mine), [torch.zeros_like(p) for p in norms]
    for number in range(4):
        x = images(seed=number)
        prediction, stepped = step(mine, optimizer, x)
        expected = plain(x)
        torch.testing.assert_close(prediction, expected.detach(), atol=1e-10, rtol=0)
        assert stepped
        for p, v, g in zip(norms, velocity, torch.autograd.grad(entropy(expected).mean(), norms), strict=True):
            v.mul_(0.9).add_(g)
            p.data -= 0.05 * v
    for a, b in zip(mine.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_only_gains_and_offsets_move():
    for make, dtype in ((cnn, torch.float64), (vit, torch.float32)):
        mine = Tent(model=make(), **SGD)
        before, optimizer = weights(mine.model), started(mine)
        step(mine, optimizer, images(dtype=dtype))
        changed = set(moved(before, mine.model))
        layers = (torch.nn.BatchNorm2d, torch.nn.LayerNorm)
        named = make().named_modules()
        allowed = {f"{n}.{k}" for n, m in named if isinstance(m, layers) for k, _ in m.named_parameters()}
        assert changed
        assert changed <= allowed


def test_with_rate_zero_it_is_bn_adapt():
    mine, plain = Tent(model=cnn(), adapt_lr=0.0), batch_statistics(cnn())
    optimizer = started(mine)
    for number in range(3):
        x = images(seed=number)
        torch.testing.assert_close(step(mine, optimizer, x)[0], plain(x).detach(), atol=1e-10, rtol=0)


def test_a_small_step_does_not_raise_the_entropy_of_its_batch():
    mine, x = Tent(model=cnn(), adapt_optimizer="sgd", adapt_lr=1e-3), images(16)
    optimizer = started(mine)
    first = entropy(step(mine, optimizer, x)[0]).mean()
    assert entropy(mine.predict(x)).mean() < first
