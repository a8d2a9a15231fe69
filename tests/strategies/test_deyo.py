"""DeYO against a float64 reference.

Against mariodoebler/test-time-adaptation deyo.py (8b2ed63, after the authors'), run apart with the same permutations:
weights and predictions of four updates 5.8e-15 at most, with the second filter open.
"""

import math

import torch
from tta import CLASSES, SGD, batch_statistics, cnn, entropy, images, moved, started, step, vit, weights

from clplat.strategies.deyo import DeYO, shuffled


def by_hand(x, order):
    """Patch by patch."""
    k, out = math.isqrt(order.shape[1]), torch.empty_like(x)
    h, w = x.shape[2] // k, x.shape[3] // k
    for b in range(len(x)):
        for to, source in enumerate(order[b].tolist()):
            (r, c), (u, v) = divmod(to, k), divmod(source, k)
            out[b, :, r * h : r * h + h, c * w : c * w + w] = x[b, :, u * h : u * h + h, v * w : v * w + w]
    return out


def test_patches_are_moved_whole():
    x, order = images(3), torch.rand(3, 16).argsort(1)
    assert torch.equal(shuffled(x, order), by_hand(x, order))
    assert torch.equal(shuffled(x, torch.arange(16).expand(3, 16)), x)
    assert shuffled(torch.rand(2, 3, 9, 7), torch.rand(2, 4).argsort(1)).shape == (2, 3, 9, 7)


def test_updates_agree_with_the_reference():
    options = {"margin": 0.15, "e_0": 0.3, "least_drop": 0.001, "patches": 2, "top": 0.0}
    mine, plain = DeYO(model=cnn(), **options, **SGD), batch_statistics(cnn())
    norms = [p for m in plain.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]
    optimizer, velocity, taken = started(mine), [torch.zeros_like(p) for p in norms], []
    for number in range(4):
        x = images(12, seed=number)
        prediction, stepped = step(mine, optimizer, x)
        logits = plain(x)
        torch.testing.assert_close(prediction, logits.detach(), atol=1e-10, rtol=0)
        h = entropy(logits)
        sure = (h < 0.15 * math.log(CLASSES)).nonzero()[:, 0]
        other = plain(by_hand(x, mine._order(x))[sure]).softmax(1)
        p, y = logits.softmax(1)[sure].max(1)
        drop = p - other[torch.arange(len(sure)), y]
        rows = sure[drop > 0.001]
        taken.append(0 < len(rows) < len(sure) < 12)
        weight = (0.3 * math.log(CLASSES) - h[rows]).exp() + drop[drop > 0.001].exp()
        assert stepped
        loss = (weight.detach() * h[rows]).mean()
        for q, v, g in zip(norms, velocity, torch.autograd.grad(loss, norms), strict=True):
            v.mul_(0.9).add_(g)
            q.data -= 0.05 * v
    assert any(taken)  # both filters let some samples pass, and not others
    for a, b in zip(mine.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-10, rtol=0)


def test_without_a_sample_that_falls_nothing_moves():
    mine = DeYO(model=cnn(), least_drop=0.999, margin=2.0, **SGD)
    optimizer, before = started(mine), weights(mine.model)
    assert not step(mine, optimizer, images())[1]
    assert moved(before, mine.model) == []


def test_top_blocks_stay():
    mine = DeYO(model=vit(), margin=2.0, least_drop=-1.0, top=0.5, **SGD)
    optimizer, before = started(mine), weights(mine.model)
    step(mine, optimizer, images(dtype=torch.float32))
    changed = moved(before, mine.model)
    assert changed
    assert all("blocks.0" in name for name in changed)
