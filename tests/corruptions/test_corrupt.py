"""What holds for every corruption: shapes, sizes, batches, devices, odd images."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from corruptions.make_reference import picture

from clplat.data.corruptions import corrupt, family_for
from clplat.data.corruptions.constants import NAMES, STANDARD
from clplat.data.corruptions.draws import Draws
from clplat.data.corruptions.jpeg import round_trip
from clplat.data.corruptions.linear import mirrored, reflected
from clplat.data.corruptions.motion import along
from clplat.data.corruptions.spatter import edges
from clplat.data.corruptions.weather import plasma
from clplat.errors import MissingError, UserError


def pictures(count: int = 4, side: int = 32, channels: int = 3) -> torch.Tensor:
    made = np.stack([picture(side, i) for i in range(count)]).transpose(0, 3, 1, 2)
    return torch.from_numpy(made[:, :channels].copy())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("side", "channels"), [(8, 1), (28, 1), (32, 3), (64, 3)])
def test_shapes_bytes_and_batches(name, side, channels):
    """The same picture alone, in another batch and in another order is the same to the bit."""
    images, indices = pictures(5, side, channels), torch.tensor([9, 4, 4_000_000_000, 0, 17])
    before = images.clone()
    for severity in (1, 5):
        made = corrupt(images, name, severity, indices=indices, seed=3)
        assert made.shape == images.shape
        assert made.dtype == torch.uint8
        assert torch.equal(images, before)
        order = torch.tensor([3, 1, 4, 0, 2])
        assert torch.equal(corrupt(images[order], name, severity, indices=indices[order], seed=3), made[order])
        alone = [corrupt(images[i : i + 1], name, severity, indices=indices[i : i + 1], seed=3) for i in range(5)]
        assert torch.equal(torch.cat(alone), made)
        assert severity == 1 or not torch.equal(made, images)


@pytest.mark.parametrize("name", STANDARD)
def test_large_images_take_the_constants_of_imagenet(name):
    images = pictures(2, 224)
    assert family_for(images.shape) == "imagenet"
    made = corrupt(images, name, 3)
    assert made.shape == images.shape
    assert torch.equal(made, corrupt(images, name, 3, family="imagenet"))


@pytest.mark.parametrize("name", NAMES)
def test_odd_images(name):
    """None, one, all black, all white, one grey, wider than high."""
    assert corrupt(torch.empty(0, 3, 32, 32, dtype=torch.uint8), name, 5).shape == (0, 3, 32, 32)
    for level in (0, 77, 255):
        made = corrupt(torch.full((1, 3, 32, 32), level, dtype=torch.uint8), name, 5)
        assert made.shape == (1, 3, 32, 32)
    wide = corrupt(pictures(2, 32)[:, :, :20], name, 5)
    assert wide.shape == (2, 3, 20, 32)
    black = torch.zeros(1, 3, 32, 32, dtype=torch.uint8)
    if name in ("contrast", "pixelate", "gaussian_blur", "defocus_blur", "zoom_blur", "fog"):
        assert not corrupt(black, name, 5).any()


def test_floating_images_and_nan_pixels():
    images = pictures(3).float() / 255
    assert torch.equal(corrupt(images, "contrast", 2), corrupt(pictures(3), "contrast", 2))
    spoilt = images.clone()
    spoilt[1, :, 5, 5] = float("nan")
    spoilt[1, :, 6, 6] = float("inf")
    made = corrupt(spoilt, "gaussian_blur", 5)
    assert torch.equal(made[[0, 2]], corrupt(images, "gaussian_blur", 5)[[0, 2]])
    held = torch.nan_to_num(spoilt, 0.0).clamp(0, 1)
    assert torch.equal(made, corrupt(held, "gaussian_blur", 5))


def test_severity_zero_is_the_image():
    assert torch.equal(corrupt(pictures(), "fog", 0), pictures())


@pytest.mark.parametrize(
    ("name", "severity", "family", "shape"),
    [("fig", 1, None, (1, 3, 8, 8)), ("fog", 6, None, (1, 3, 8, 8)), ("fog", 1, "mnist", (1, 3, 8, 8)),
     ("fog", 1, None, (3, 8, 8)), ("fog", 1, None, (1, 4, 8, 8))],
)  # fmt: skip
def test_refuses(name, severity, family, shape):
    with pytest.raises(UserError, match="corruption: "):
        corrupt(torch.zeros(shape, dtype=torch.uint8), name, severity, family=family)


def test_jpeg_is_pillows_to_the_bit():
    from PIL import Image

    for side, quality in ((8, 80), (17, 50), (28, 65), (32, 40), (32, 7), (64, 15), (224, 25)):
        for number in range(3):
            image = Image.fromarray(picture(side, number))
            for mode in ("RGB", "L"):
                file = io.BytesIO()
                image.convert(mode).save(file, "JPEG", quality=quality)
                expected = torch.from_numpy(np.array(Image.open(file))).view(side, side, -1).permute(2, 0, 1)
                pixels = torch.from_numpy(np.array(image.convert(mode))).view(side, side, -1).permute(2, 0, 1)
                assert torch.equal(round_trip(pixels[None].float(), quality)[0].to(torch.uint8), expected)


def test_glass_blur_by_the_loop_it_stands_for():
    """One pixel after the other, from the last to the first, each takes the value at its shift."""
    from clplat.data.corruptions.blur import _sources

    for shift in (1, 2, 4):
        moves = Draws(torch.arange(3), "glass").integers(-shift, shift, 16 - 2 * shift, 12 - 2 * shift, 2)
        found = _sources(Draws(torch.arange(3), "glass"), 16, 12, shift)
        for image in range(3):
            held = np.arange(16 * 12).reshape(16, 12)
            for i, row in enumerate(range(16 - shift, shift, -1)):
                for j, column in enumerate(range(12 - shift, shift, -1)):
                    across, down = moves[image, i, j].tolist()
                    held[row, column] = held[row + down, column + across]
            assert found[image].tolist() == held.ravel().tolist()


def test_motion_blur_by_its_definition():
    """A dot becomes the weights of the line that ends in it; the border repeats itself."""
    image = torch.zeros(2, 1, 21, 21, dtype=torch.uint8)
    image[:, 0, 10, 10] = 255
    made = along(image, 3, 2.0, torch.tensor([0.0, 90.0]))
    weights = np.exp(-(np.arange(7) ** 2) / 8)
    expected = np.floor(255 * weights / weights.sum())
    assert made[0, 0, 10, 4:11].flip(0).tolist() == expected.tolist()
    assert made[1, 0, 4:11, 10].flip(0).tolist() == expected.tolist()
    flat = along(torch.full((1, 3, 9, 9), 200, dtype=torch.uint8), 6, 2.0, torch.tensor([30.0]))
    assert flat.unique().tolist() == [200]


def test_fog_is_rough_at_all_scales():
    """The power of the cloud falls with frequency, the faster the larger its decay."""
    clouds = {decay: plasma(Draws(torch.arange(64), "fog"), 64, decay) for decay in (1.5, 3.0)}
    high = {}
    for decay, cloud in clouds.items():
        assert cloud.amin((1, 2)).eq(0).all()
        assert cloud.amax((1, 2)).eq(1).all()
        power = torch.fft.rfft2(cloud - cloud.mean((1, 2), keepdim=True)).abs().square().mean(0)
        high[decay] = float(power[16:48].sum() / power.sum())
    assert high[1.5] > 2 * high[3.0]


def test_edges_follow_a_weak_ridge_from_a_strong_one():
    """A step that fades from row to row: Canny keeps its weak part since it touches the strong one."""
    height = torch.linspace(60, 15, 40)[:, None]  # gradients from 240 to 60, between the thresholds from row 20 on
    layer = torch.where(torch.arange(40) < 20, 0.0, height)[None, None].round()
    found = edges(layer)[0, 0]
    assert found.any(1)[1:-1].all()
    assert found.sum() <= 2 * 40
    faint = edges((layer > 0) * 30.0)  # weak throughout
    assert not faint.any()


def test_borders():
    assert mirrored(np.arange(-3, 6), 3).tolist() == [2, 1, 0, 0, 1, 2, 2, 1, 0]
    assert reflected(np.arange(-3, 6), 3).tolist() == [1, 2, 1, 0, 1, 2, 1, 0, 1]
    assert reflected(np.arange(3), 1).tolist() == [0, 0, 0]


def test_frost_pictures(tmp_path):
    from PIL import Image

    plain = corrupt(pictures(8), "frost", 5)
    assert len({tuple(p.flatten()[:50].tolist()) for p in plain.float() - pictures(8)}) > 1
    with pytest.raises(MissingError, match=r"frost1.png can't be read"):
        corrupt(pictures(), "frost", 5, frost_folder=str(tmp_path))
    for name in ("frost1.png", "frost2.png", "frost3.png", "frost4.jpg", "frost5.jpg"):
        Image.new("RGB", (300, 200), (200, 200, 200)).save(tmp_path / name)
    made = corrupt(pictures(), "frost", 5, frost_folder=str(tmp_path)).float()
    expected = (pictures() * 0.75 + 200 * 0.45).clamp(0, 255).floor()
    assert (made - expected).abs().max() <= 1
    huge = corrupt(torch.zeros(1, 3, 300, 300, dtype=torch.uint8), "frost", 5, frost_folder=str(tmp_path))
    assert huge.float().mean() > 100
