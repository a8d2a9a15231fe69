"""EfficientNet-Lite0 of ImageNet through clplat: what timm's own network says of real photographs."""

from pathlib import Path

import numpy as np
import pytest
import timm as library
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from clplat.backbones.base import Classifier
from clplat.backbones.heads import Linear
from clplat.backbones.timm import timm
from clplat.data.datasets import find_root

# Classes of ImageNet, and of PACS.
NAMES = {"dog": (range(151, 269), 0), "elephant": ((101, 385, 386), 1)}
SOURCE = "weights/efficientnet_lite0"


@pytest.fixture(scope="module")
def root() -> Path:
    found = find_root(None)
    for part in (f"{SOURCE}/model.safetensors", "pacs32/test.npz"):
        if found is None or not (found / part).is_file():
            pytest.skip(f"CLPLAT_DATA has no {part}")
    return found


@pytest.fixture(scope="module")
def own(root):
    """timm's network, by itself."""
    net = library.create_model("tf_efficientnet_lite0")
    net.load_state_dict(load_file(root / SOURCE / "model.safetensors"))
    return net.eval()


def photographs(root, name):
    """Test images (N, 32, 32, 3) bytes of a class of PACS, in its domain of photographs."""
    with np.load(root / "pacs32" / "test.npz") as held:
        return held["images"][(held["domain"] == 0) & (held["labels"] == NAMES[name][1])]


def pictures(own, images):
    """What timm's transforms make of pictures, before mean and deviation: (N, 3, 224, 224) in [0, 1]."""
    *transforms, _ = create_transform(**resolve_model_data_config(own)).transforms
    made = []
    for image in images:
        picture = Image.fromarray(image)
        for transform in transforms:
            picture = transform(picture)
        made.append(picture)
    return torch.stack(made)


def classifier(side):
    return Classifier(timm((3, side, side), weights=SOURCE), Linear(1280, 1000, weights=SOURCE)).eval()


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_dogs_and_elephants_are_named_as_timm_names_them(root, own, name):
    prepared = pictures(own, photographs(root, name))
    logits, expected = classifier(224)(prepared), own((prepared - 0.5) / 0.5)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    right = torch.tensor(list(NAMES[name][0]))
    assert torch.isin(logits.argmax(1), right).sum() == torch.isin(expected.argmax(1), right).sum()


@torch.no_grad()
def test_images_of_a_stream_are_scaled_as_timm_scales_a_picture(root, own):
    images = photographs(root, "elephant")[:8]
    stored = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255
    net = classifier(32)
    scaled = net.backbone.fit(stored, bounded=True)
    # Pillow rounds to bytes in each direction; the weights of bicubic scaling sum to 1.25 at most without their signs.
    assert (scaled - pictures(own, images)).abs().max() < (0.5 * 1.25 + 0.5 + 0.01) / 255
    torch.testing.assert_close(net(stored), own((scaled - 0.5) / 0.5), atol=1e-5, rtol=1e-5)
