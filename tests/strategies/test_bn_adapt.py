import pytest
import torch
from torch import nn
from tta import batch_statistics, cnn, images, moved, started, step, vit, weights

from clplat.errors import UserError
from clplat.strategies.bn_adapt import BNAdapt


def blended(model, x, share):
    """Outputs of `model` where every batch norm is written out by hand with blended statistics."""

    def hook(layer, args, output):
        (x,) = args
        mean, var = x.mean((0, 2, 3)), x.var((0, 2, 3), unbiased=False)
        mean = (1 - share) * layer.running_mean + share * mean
        var = (1 - share) * layer.running_var + share * var
        shape = (1, -1, 1, 1)
        normal = (x - mean.view(shape)) / (var.view(shape) + layer.eps).sqrt()
        return normal * layer.weight.view(shape) + layer.bias.view(shape)

    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.register_forward_hook(hook)
    return model.eval()(x)


@pytest.mark.parametrize("share", [0.0, 0.1, 0.6, 1.0])
def test_statistics_are_blended(share):
    mine, x = BNAdapt(model=cnn(), share=share), images()
    before = weights(mine)
    assert started(mine) is None
    prediction = step(mine, None, x)[0]
    torch.testing.assert_close(prediction, blended(cnn(), x, share).detach(), atol=1e-10, rtol=0)
    torch.testing.assert_close(mine.predict(x), prediction, atol=1e-10, rtol=0)
    assert moved(before, mine) == []


def test_share_zero_is_source_and_one_is_the_batch():
    x = images()
    for share, expected in ((0.0, cnn().eval()), (1.0, batch_statistics(cnn()))):
        mine = BNAdapt(model=cnn(), share=share)
        started(mine)
        torch.testing.assert_close(step(mine, None, x)[0], expected(x).detach(), atol=1e-10, rtol=0)


def test_refuses_a_model_without_batch_norm_and_a_share_out_of_range():
    with pytest.raises(UserError, match="bn_adapt needs batch normalisation"):
        BNAdapt(model=vit())
    with pytest.raises(UserError, match=r"strategy\.share: 1\.5"):
        BNAdapt(model=cnn(), share=1.5)
