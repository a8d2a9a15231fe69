"""The numbers that corruptions draw, and noise in distribution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from corruptions.make_reference import picture
from scipy import stats

from clplat.data.corruptions import Draws, corrupt
from clplat.data.corruptions.constants import FAMILIES

MANY = torch.arange(400)


def grey(level: int, count: int = 64, side: int = 64) -> torch.Tensor:
    return torch.full((count, 3, side, side), level, dtype=torch.uint8)


def test_draws_belong_to_the_image_and_the_purpose():
    whole = Draws(MANY, 0, "fog", 1).words(50)
    part = Draws(MANY[[7, 3]], 0, "fog", 1).words(50)
    assert torch.equal(part, whole[[7, 3]])
    for other in ((1, "fog", 1), (0, "snow", 1), (0, "fog", 2)):
        assert (Draws(MANY, *other).words(50) == whole).float().mean() < 1e-3
    draws = Draws(MANY, 0, "fog", 1)
    first, second = draws.words(20), draws.words(30)
    assert torch.equal(torch.cat([first, second], 1), whole)  # what is drawn later goes on where the first ended
    assert len(whole.unique()) > 0.999 * whole.numel()


def test_uniform_numbers_are_uniform_and_independent():
    numbers = Draws(MANY, 3, "test").uniform(1000)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    assert stats.kstest(numbers.flatten()[:100_000].numpy(), "uniform").pvalue > 1e-3
    centred = numbers - 0.5
    for a, b in ((centred[:, 1:], centred[:, :-1]), (centred[1:], centred[:-1])):  # next number, next image
        correlation = float((a * b).mean() * 12)
        assert abs(correlation) < 5 / np.sqrt(a.numel())
    bits = (Draws(MANY, 3, "test").words(1000)[..., None] >> torch.arange(32)) & 1
    assert (bits.float().mean((0, 1)) - 0.5).abs().max() < 5 * 0.5 / np.sqrt(4e5)


def test_normal_numbers_are_normal():
    numbers = Draws(MANY, 3, "test").normal(999)
    assert numbers.shape == (400, 999)
    assert float(numbers.mean()) == pytest.approx(0, abs=5 / np.sqrt(numbers.numel()))
    assert float(numbers.var()) == pytest.approx(1, abs=5 * np.sqrt(2 / numbers.numel()))
    assert stats.kstest(numbers.flatten()[:100_000].numpy(), "norm").pvalue > 1e-3


def test_integers_cover_their_range_evenly():
    numbers = Draws(MANY, 3, "test").integers(-2, 3, 500)
    counts = torch.bincount((numbers + 2).flatten(), minlength=5)
    assert len(counts) == 5
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("family", ["cifar", "imagenet"])
@pytest.mark.parametrize("severity", [1, 5])
@pytest.mark.parametrize("level", [0, 1, 40, 128, 255])
def test_shot_noise_is_poisson(family, severity, level):
    """Against SciPy's probabilities, count by count; what is above white is clipped."""
    photons = FAMILIES[family]["shot_noise"][severity - 1]
    made = corrupt(grey(level), "shot_noise", severity, family=family).flatten().numpy()
    counts = np.arange(0, 4 * photons + 40)
    probability = stats.poisson.pmf(counts, level / 255 * photons)
    levels = np.floor(np.minimum(counts / photons, 1) * 255 + 2**-9).astype(int)
    expected = np.bincount(levels, weights=probability, minlength=256) * len(made)
    found = np.bincount(made, minlength=256)
    assert found[expected < 1e-6 * len(made)].sum() <= 3
    kept = expected > 20
    assert (abs(found - expected)[kept] < 5.5 * np.sqrt(expected[kept])).all()
    assert made.mean() == pytest.approx((levels * probability).sum(), abs=0.3)


@pytest.mark.parametrize("severity", [1, 3, 5])
def test_impulse_noise_has_its_share_of_black_and_white(severity):
    share = FAMILIES["imagenet"]["impulse_noise"][severity - 1]
    made = corrupt(grey(100), "impulse_noise", severity, family="imagenet")
    spread = 5 * np.sqrt(share / made.numel())
    for level in (0, 255):
        assert float((made == level).float().mean()) == pytest.approx(share / 2, abs=spread)
    assert set(made.unique().tolist()) == {0, 100, 255}


@pytest.mark.parametrize("name", ["gaussian_noise", "speckle_noise", "impulse_noise", "shot_noise"])
def test_noise_is_white(name):
    """No frequency and no channel has more of it than another."""
    change = (corrupt(grey(128, 256, 32), name, 3).float() - 128) / 255
    change = change - change.mean()
    power = torch.fft.fft2(change).abs().square().mean((0, 1)) / change.var() / 1024
    assert (power - 1).abs().max() < 6 / np.sqrt(256 * 3)
    channels = torch.corrcoef(change.transpose(0, 1).flatten(1))
    assert (channels - torch.eye(3)).abs().max() < 5 / np.sqrt(256 * 1024)


@pytest.mark.parametrize("name", ["gaussian_noise", "speckle_noise"])
@pytest.mark.parametrize("severity", [1, 5])
def test_gaussian_and_speckle_noise_have_their_deviation(name, severity):
    level = 128 / 255
    deviation = FAMILIES["cifar"][name][severity - 1] * (level if name == "speckle_noise" else 1)
    made = corrupt(grey(128), name, severity).float() / 255
    assert float(made.std()) == pytest.approx(deviation, rel=0.02)
    assert float(made.mean()) == pytest.approx(level - 0.5 / 255, abs=1e-3)  # rounded down


@pytest.mark.parametrize("name", ["gaussian_noise", "shot_noise", "impulse_noise", "brightness", "contrast",
                                  "jpeg_compression"])  # fmt: skip
@pytest.mark.parametrize(("family", "side"), [("cifar", 32), ("imagenet", 64)])
def test_more_severe_is_further_from_the_image(name, family, side):
    image = torch.from_numpy(picture(side, 0)).permute(2, 0, 1)[None].repeat(16, 1, 1, 1)
    distances = [float((corrupt(image, name, s, family=family).float() - image).square().mean()) for s in range(1, 6)]
    assert distances == sorted(distances)
    assert distances[0] > 0
