"""Residual networks that published test-time adaptation starts from, whose weights fit by name.

Source   WRN-28-10: Zagoruyko, Komodakis, "Wide Residual Networks", BMVC 2016, arXiv:1605.07146.
         ResNeXt-29 (4 x 32d): Xie et al., CVPR 2017, arXiv:1611.05431, with the weights of AugMix, arXiv:1912.02781.
         ResNet-50: He et al., CVPR 2016, arXiv:1512.03385, built by timm.
Checked  against the parameter counts and the names of RobustBench's `Standard` (CIFAR-10) and
         `Hendrycks2020AugMix_ResNeXt` (CIFAR-100), and of torchvision's ResNet-50.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones import _weights
from clplat.backbones.base import Backbone, Normalize, image_shape


class _WideBlock(nn.Module):
    """Normalise and rectify, then convolve, twice; where the shape changes, the shortcut starts after the first two."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(before)
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.convShortcut = None if before == after else nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        active = F.relu(self.bn1(inputs))
        shortcut = inputs if self.convShortcut is None else self.convShortcut(active)
        return shortcut + self.conv2(F.relu(self.bn2(self.conv1(active))))


class _Bottleneck(nn.Module):
    """A grouped 3x3 convolution between two of 1x1."""

    def __init__(self, before: int, planes: int, stride: int) -> None:
        super().__init__()
        middle, after = planes * 2, planes * 4  # 4 groups of planes / 2
        self.conv_reduce = nn.Conv2d(before, middle, 1, bias=False)
        self.bn_reduce = nn.BatchNorm2d(middle)
        self.conv_conv = nn.Conv2d(middle, middle, 3, stride, 1, groups=4, bias=False)
        self.bn = nn.BatchNorm2d(middle)
        self.conv_expand = nn.Conv2d(middle, after, 1, bias=False)
        self.bn_expand = nn.BatchNorm2d(after)
        project = (nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
        self.downsample = nn.Sequential(*project) if stride != 1 or before != after else None

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.bn_reduce(self.conv_reduce(inputs)))
        hidden = self.bn_expand(self.conv_expand(F.relu(self.bn(self.conv_conv(hidden)))))
        return F.relu((inputs if self.downsample is None else self.downsample(inputs)) + hidden)


class _Wide(Backbone):
    """Three stages of four wide blocks; `widen` is the factor of the widths 16, 32, 64."""

    def __init__(self, channels: int, widen: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        before = 16
        for number, width in enumerate((16 * widen, 32 * widen, 64 * widen), start=1):
            blocks = [
                _WideBlock(before if k == 0 else width, width, 2 if number > 1 and k == 0 else 1) for k in range(4)
            ]
            stage = nn.Module()
            stage.layer = nn.Sequential(*blocks)
            self.add_module(f"block{number}", stage)
            before = width
        self.bn1 = nn.BatchNorm2d(before)
        self.embed_dim = before

    @property
    def blocks(self) -> list[nn.Module]:
        return [b for n in (1, 2, 3) for b in self.get_submodule(f"block{n}.layer").children()]

    def features(self, inputs: Tensor) -> Tensor:
        hidden = self.conv1(inputs)
        for block in self.blocks:
            hidden = block(hidden)
        return F.relu(self.bn1(hidden)).mean((2, 3))


class _ResNeXt(Backbone):
    """Three stages of three bottlenecks."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_1_3x3 = nn.Conv2d(channels, 64, 3, 1, 1, bias=False)
        self.bn_1 = nn.BatchNorm2d(64)
        before = 64
        for number, planes in enumerate((64, 128, 256), start=1):
            blocks = []
            for k in range(3):
                blocks.append(_Bottleneck(before, planes, 2 if number > 1 and k == 0 else 1))
                before = planes * 4
            self.add_module(f"stage_{number}", nn.Sequential(*blocks))
        self.embed_dim = before

    @property
    def blocks(self) -> list[nn.Module]:
        return [b for n in (1, 2, 3) for b in self.get_submodule(f"stage_{n}").children()]

    def features(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.bn_1(self.conv_1_3x3(inputs)))
        for block in self.blocks:
            hidden = block(hidden)
        return hidden.mean((2, 3))


class _Timm(Backbone):
    """timm's ResNet without its classifier."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        from timm.models import create_model

        self.net = create_model("resnet50", num_classes=0, in_chans=channels)
        self.embed_dim = 2048

    @property
    def blocks(self) -> list[nn.Module]:
        return [b for n in (1, 2, 3, 4) for b in self.get_submodule(f"net.layer{n}").children()]

    def features(self, inputs: Tensor) -> Tensor:
        return self.net(inputs)


def wide_resnet28_10(
    input_shape: tuple[int, ...], weights: str = "random", normalize: Normalize | None = None
) -> Backbone:
    """WRN-28-10 for small images (36.5 million parameters, 640 features).

    Args:
        input_shape: (channels, height, width).
        weights: "random", or the path of a .safetensors file with the names of RobustBench's `Standard` for CIFAR-10.
        normalize: images in [0, 1] first, by imagenet or by a half; those weights take them as they are. null: as a
            config.json beside the weights says, else none.
    """
    return _made(_Wide, input_shape, "wide_resnet28_10", weights, normalize, "fc.")


def resnext29(input_shape: tuple[int, ...], weights: str = "random", normalize: Normalize | None = None) -> Backbone:
    """ResNeXt-29 (4 x 32d) for small images (6.8 million parameters, 1024 features).

    Args:
        input_shape: (channels, height, width).
        weights: "random", or the path of a .safetensors file with the names of RobustBench's
            `Hendrycks2020AugMix_ResNeXt`.
        normalize: images in [0, 1] first, by imagenet or by a half; null: by the `mu` and `sigma` that those weights
            hold, or as a config.json beside them says, else none.
    """
    return _made(_ResNeXt, input_shape, "resnext29", weights, normalize, "classifier.", "mu", "sigma")


def resnet50(input_shape: tuple[int, ...], weights: str = "random", normalize: Normalize | None = None) -> Backbone:
    """ResNet-50 (23.5 million parameters, 2048 features).

    Args:
        input_shape: (channels, height, width).
        weights: "random", or the path of a .safetensors file with torchvision's names (timm's resnet50.tv_in1k is one).
        normalize: images in [0, 1] first, by imagenet as those weights need, or by a half; null: as a config.json
            beside them says, else none.
    """
    return _made(_Timm, input_shape, "resnet50", weights, normalize, "fc.")


def _made(
    family: Callable[[int], Backbone], input_shape: tuple[int, ...], name: str, weights: str,
    normalize: Normalize | None, *spare: str,
) -> Backbone:  # fmt: skip
    channels, _, _ = image_shape(input_shape, name)
    net, own = family(channels), _weights.statistics(weights)
    if weights != "random":
        inner = net.net if isinstance(net, _Timm) else net
        state = _weights.read(weights)
        counters = {k: v for k, v in inner.state_dict().items() if k.endswith("num_batches_tracked")}
        _weights.fit(inner, counters | state, weights, spare=lambda key: key.startswith(spare))
        if {"mu", "sigma"} <= state.keys():
            own = state["mu"].flatten().tolist(), state["sigma"].flatten().tolist()
    return net.normalizing(normalize, channels, own)
