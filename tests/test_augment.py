"""The batched augmentations against torchvision's functions, one image batch at a time in float64."""

import pytest
import torch
import torchvision.transforms.functional as T
from torchvision.transforms import InterpolationMode

from clplat.components import augment as module
from clplat.components.augment import augment, draw


def one_by_one(x, draws, n):
    """The n-th augmentation of a batch as the authors put it together, without the noise."""
    height, width = x.shape[-2:]
    x = x.clamp(0, 1)
    for which in draws.order[n].tolist():
        factor = draws.colours[n, which].item()
        if which == 4:
            x = T.adjust_gamma(x.clamp(1e-8, 1), factor)
        else:
            change = (T.adjust_brightness, T.adjust_contrast, T.adjust_saturation, T.adjust_hue)[which]
            x = change(x, factor)
    x = T.pad(x, [width // 2, height // 2], padding_mode="edge")
    shift, scale = [int(v) for v in draws.shift[n]], draws.scale[n].item()
    x = T.affine(x, draws.degrees[n].item(), shift, scale, [0.0, 0.0], interpolation=InterpolationMode.BILINEAR)
    x = T.center_crop(T.gaussian_blur(x, [5, 5], [draws.sigma[n].item()] * 2), [height, width])
    return (T.hflip(x) if draws.mirror[n] else x).clamp(0, 1)


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 33, 33), (3, 16, 24)])
def test_agrees_with_torchvision(shape):
    x = 1.2 * torch.rand(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) - 0.1
    x[2] = 0.5  # grey: no hue
    draws = draw(12, *shape[1:], torch.Generator().manual_seed(1))
    out = augment(x, draws).view(12, 3, *shape)
    for n in range(12):
        torch.testing.assert_close(out[n], one_by_one(x, draws, n), atol=1e-5, rtol=0)


def test_range_shape_and_equal_images():
    x = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)).expand(4, -1, -1, -1)
    draws = draw(5, 32, 32, torch.Generator().manual_seed(1))
    noise = torch.randn(5, 4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    out = augment(x, draws, noise)
    assert out.shape == (20, 3, 32, 32)
    assert out.min() >= 0
    assert out.max() <= 1
    plain = augment(x, draws).view(5, 4, 3, 32, 32)
    torch.testing.assert_close(plain, plain[:, :1].expand_as(plain), atol=1e-5, rtol=0)
    free = (plain > 0.05) & (plain < 0.95)  # where nothing is clipped
    difference = (out.view_as(plain) - plain)[free]
    assert abs(difference.std() / module.NOISE - 1) < 0.02
    again = augment(x, draw(5, 32, 32, torch.Generator().manual_seed(1)), noise)
    assert torch.equal(out, again)
    assert augment(x[:0], draws).shape == (0, 3, 32, 32)


def test_draws_lie_in_the_published_ranges():
    draws = draw(4000, 32, 32, torch.Generator().manual_seed(0))
    for column, (low, high) in zip(draws.colours.T, module.COLOURS.values(), strict=True):
        assert low <= column.min() < low + 0.02 * (high - low)
        assert high >= column.max() > high - 0.02 * (high - low)
    assert draws.shift.abs().max() == 4  # a sixteenth of the padded side
    assert torch.equal(draws.shift, draws.shift.round())
    assert (draws.order.sort(1).values == torch.arange(5)).all()
    assert len(draws.order.unique(dim=0)) == 120
    assert abs(draws.mirror.float().mean() - 0.5) < 0.05
    assert draws.degrees.abs().max() <= 15
    assert 0.9 <= draws.scale.min() <= draws.scale.max() <= 1.1
    assert 0.001 <= draws.sigma.min() <= draws.sigma.max() <= 0.5
