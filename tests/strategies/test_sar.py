"""SAR against a float64 reference.

Against the authors' code (mr-eggplant/SAR 20f6e24, run apart, ResNet-20, four updates with SGD): largest difference of
weights and predictions 2.2e-16 and 1.5e-14 in float64. Theirs keeps the running loss, so resets again in the next step.
"""

import math

import pytest
import torch
from tta import CLASSES, SGD, batch_statistics, cnn, entropy, images, moved, started, step, vit, weights

from clplat.backbones.resnets import resnet50
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError
from clplat.strategies._affine import last_stage
from clplat.strategies.sar import SAR


def make(model=cnn, **options):
    return SAR(model=model(), **{"margin": 0.8, "rho": 0.3, "collapse": 0.0, "top": 0.5, **SGD, **options})


def lower(model):
    """Gains and offsets below the second stage."""
    parts = (model.backbone.bn1, model.backbone.layer1)
    return [p for part in parts for m in part.modules() if isinstance(m, torch.nn.BatchNorm2d) for p in m.parameters()]


def test_updates_agree_with_the_reference():
    mine, plain, limit = make(), batch_statistics(cnn()), 0.8 * math.log(CLASSES)
    adapted, optimizer = lower(plain), started(mine)
    velocity, running = [torch.zeros_like(p) for p in adapted], None
    for number in range(4):
        x = images(12, seed=number)
        prediction, stepped = step(mine, optimizer, x)
        logits = plain(x)
        torch.testing.assert_close(prediction, logits.detach(), atol=1e-7, rtol=0)
        first = entropy(logits) < limit
        assert stepped
        gradients = torch.autograd.grad(entropy(logits)[first].mean(), adapted)
        length = torch.sqrt(sum((g**2).sum() for g in gradients))
        before = [p.detach().clone() for p in adapted]
        for p, g in zip(adapted, gradients, strict=True):
            p.data += 0.3 * g / length
        again = entropy(plain(x))
        loss = again[first & (again < limit)].mean()
        running = loss.item() if running is None else 0.9 * running + 0.1 * loss.item()
        gradients = torch.autograd.grad(loss, adapted)
        for p, w, v, g in zip(adapted, before, velocity, gradients, strict=True):
            v.mul_(0.9).add_(g)
            p.data = w - 0.05 * v
        assert abs(mine.kept["loss"] - running) < 1e-7
    for a, b in zip(mine.model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-7, rtol=0)


def test_the_top_stays():
    for model, dtype, top in ((cnn, torch.float64, 0.5), (vit, torch.float32, 0.5)):
        mine = make(model, margin=2.0)
        before, optimizer = weights(mine.model), started(mine)
        step(mine, optimizer, images(dtype=dtype))
        blocks = mine.model.backbone.blocks
        above = {id(p) for b in blocks[len(blocks) - math.ceil(top * len(blocks)) :] for p in b.parameters()}
        names = {n for n, p in mine.model.named_parameters() if id(p) in above}
        changed = set(moved(before, mine.model))
        assert changed
        assert not changed & names
        assert not any(n.endswith("net.norm.weight") or "fc_norm" in n for n in changed)  # after the blocks


def test_defaults_are_the_published_ones():
    optimizer = started(SAR(model=cnn()))
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.defaults["lr"], optimizer.defaults["momentum"]) == (2.5e-4, 0.9)


def test_without_a_top_the_last_stage_stays():
    large, small = resnet50((3, 32, 32)), cnn().backbone
    assert last_stage(large, large.blocks) == list(large.net.layer4.children())
    assert last_stage(small, small.blocks) == list(small.layer2.children())
    deep = vit_micro((3, 8, 8), dim=8, depth=12, heads=2)
    assert last_stage(deep, deep.blocks) == deep.blocks[9:]
    mine = SAR(model=cnn())
    above = {id(p) for p in mine.model.backbone.layer2.parameters()}
    assert mine._chosen()
    assert not above & {id(p) for p in mine._chosen()}


def test_without_a_climb_it_is_filtered_entropy_minimisation():
    from clplat.strategies.tent import Tent

    mine, tent = make(rho=0.0, margin=50.0, top=0.0), Tent(model=cnn(), **SGD)
    first, second = started(mine), started(tent)
    for number in range(3):
        x = images(seed=number)
        torch.testing.assert_close(step(mine, first, x)[0], step(tent, second, x)[0], atol=1e-7, rtol=0)


def test_it_goes_back_when_it_collapses():
    mine = make(collapse=50.0, adapt_optimizer="adam")
    source, optimizer = weights(mine.model), started(mine)
    step(mine, optimizer, images(12))
    assert moved(source, mine.model) == []
    assert not optimizer.state
    assert mine.kept == {"loss": None, "resets": 1}


def test_no_step_leaves_no_climb_behind():
    mine = make(rho=1e4)  # so far up that nothing is reliable there, or not even finite
    before, optimizer = weights(mine.model), started(mine)
    mine.margin = 0.3
    _, stepped = step(mine, optimizer, images(12))
    if not stepped:
        assert moved(before, mine.model) == []
    mine = make(margin=1e-9)
    before, optimizer = weights(mine.model), started(mine)
    assert step(mine, optimizer, images(12))[1] is False
    assert moved(before, mine.model) == []


def test_refuses_a_top_that_leaves_nothing():
    with pytest.raises(UserError, match=r"strategy\.top: 1\.0"):
        make(top=1.0)
