"""Test-time adaptation on a network of timm, whose batch normalisations are followed by an activation within."""

import pytest
import torch
from torch import nn
from tta import CLASSES, SGD, batch_statistics, images, moved, started, step, weights

from clplat.backbones.base import Classifier
from clplat.backbones.heads import Linear
from clplat.backbones.timm import timm
from clplat.components.norms import BatchNorm, prepare_training
from clplat.strategies.bn_adapt import BNAdapt
from clplat.strategies.cotta import CoTTA
from clplat.strategies.eata import EATA
from clplat.strategies.rotta import RoTTA
from clplat.strategies.sar import SAR
from clplat.strategies.source import Source
from clplat.strategies.tent import Tent

STEPPING = {
    "tent": lambda model: Tent(model=model, **SGD),
    "eata": lambda model: EATA(model=model, margin=2.0, redundancy=2.0, fisher_weight=0.0, **SGD),
    "sar": lambda model: SAR(model=model, margin=2.0, **SGD),
    "rotta": lambda model: RoTTA(model=model, memory=6, update_every=3, **SGD),
    "cotta": lambda model: CoTTA(model=model, augmentations=2, gate=2.0, **SGD),
}


def network():
    """timm's smallest EfficientNet on (3, 8, 8), scaled to 32 pixels, with statistics that are not a fresh one's."""
    torch.manual_seed(0)
    net = Classifier(timm((3, 8, 8), "test_efficientnet", image_size=32), Linear(256, CLASSES)).double()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.2)
            module.running_var.uniform_(0.5, 1.5)
    return net


def test_its_normalisations_are_followed_by_an_activation():
    acting = [m for m in network().modules() if type(m).__name__ == "BatchNormAct2d"]
    assert any(not isinstance(m.act, nn.Identity) for m in acting)


def test_bn_adapt_is_timms_own_network_with_the_statistics_of_the_batch():
    model = network()
    expected = batch_statistics(model)(images())
    mine = BNAdapt(model=model)
    optimizer = started(mine)
    predictions, _ = step(mine, optimizer, images())
    torch.testing.assert_close(predictions, expected)
    assert any(isinstance(m, BatchNorm) and list(m.children()) for m in mine.model.modules())


def test_source_is_timms_own_network_as_it_was():
    model = network()
    expected = model.eval()(images())
    mine = Source(model=model)
    predictions, _ = step(mine, started(mine), images())
    torch.testing.assert_close(predictions, expected)


@pytest.mark.parametrize("name", STEPPING)
def test_every_strategy_that_steps_steps(name):
    mine = STEPPING[name](network())
    optimizer = started(mine)
    before = weights(mine.model)
    for number in range(4):
        predictions, _ = step(mine, optimizer, images(seed=number))
        assert predictions.isfinite().all()
        assert predictions.shape == (6, CLASSES)
    changed = moved(before, mine.model)
    assert changed
    assert not [n for n in changed if "conv" in n and name != "cotta"]


def test_it_trains_on_batches_as_timm_does_and_on_one_sample():
    one, other = network(), network()
    prepare_training(one, 1)
    assert torch.equal(one.train()(images()), other.train()(images()))
    assert {k: v.tolist() for k, v in one.state_dict().items()} == {
        k: v.tolist() for k, v in other.state_dict().items()
    }
    layer = next(m for m in one.modules() if isinstance(m, BatchNorm) and list(m.children()))
    x = torch.randn(1, layer.num_features, 1, 1, dtype=torch.float64)
    with pytest.warns(UserWarning, match="one sample"):
        alone = layer.train()(x)
    assert torch.equal(alone, layer.eval()(x))
