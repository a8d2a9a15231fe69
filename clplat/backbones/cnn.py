"""Residual networks for small images.

Source   He et al., "Deep Residual Learning", CVPR 2016, arXiv:1512.03385 (section 4.2 for ResNet-20 and -32).
         Slim ResNet-18: Lopez-Paz and Ranzato, "Gradient Episodic Memory", NeurIPS 2017, arXiv:1706.08840.
Checked  against facebookresearch/GradientEpisodicMemory model/common.py (shapes and parameter count) and the weights
         of akamaster/pytorch_resnet_cifar10 (BSD-2), whose names and layout ResNet-20 and -32 share.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones import _weights
from clplat.backbones.base import Backbone, Normalize, image_shape, require


class Pad(nn.Module):
    """Shortcut without parameters (option A): every second pixel, the new channels zero, half of them on each side."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, inputs: Tensor) -> Tensor:
        return F.pad(inputs[:, :, ::2, ::2], (0, 0, 0, 0, self.channels // 2, self.channels - self.channels // 2))


class Project(nn.Conv2d):
    """A 1x1 convolution of every `stride`-th pixel: the stride is a slice, not the kernel's.

    oneDNN's strided kernel writes past its workspace when it computes the weights' gradient for fewer than eight
    channels that lie last in memory, on processors whose newest instructions are AVX2 (oneDNN issue 6035): gradients
    off by their whole size.
    """

    def forward(self, inputs: Tensor) -> Tensor:
        rows, columns = self.stride
        return F.conv2d(inputs[:, :, ::rows, ::columns], self.weight, self.bias)


class Convolution(nn.Conv2d):
    """A 3x3 convolution, padded by one, without an offset; on an image of one pixel its stride is no stride.

    The output is the same. oneDNN's strided kernel for AMX reads memory that nothing has written when it computes the
    weights' gradient of such an image in bfloat16: gradients are NaN now and then.
    """

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__(before, after, 3, stride, 1, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        stride = (1, 1) if inputs.shape[2:] == (1, 1) else self.stride
        return F.conv2d(inputs, self.weight, None, stride, self.padding)


class Residual(nn.Module):
    """Two 3x3 convolutions beside a shortcut.

    Args:
        before, after: channels in and out.
        stride: of the first convolution.
        pad: shortcut without parameters instead of a 1x1 convolution, where the shape changes.
    """

    def __init__(self, before: int, after: int, stride: int, pad: bool) -> None:
        super().__init__()
        self.conv1 = Convolution(before, after, stride)
        self.bn1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(after)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            project = (Project(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            self.shortcut = Pad(after - before) if pad else nn.Sequential(*project)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(inputs)))
        return F.relu(self.bn2(self.conv2(hidden)) + self.shortcut(inputs))


class ResNet(Backbone):
    """A 3x3 stem, stages of residual blocks (the first at full size, each later one at half), the mean over pixels.

    Args:
        channels: of the inputs.
        widths: channels of each stage.
        depth: blocks per stage.
        pad: see `Residual`.
    """

    def __init__(self, channels: int, widths: Sequence[int], depth: int, pad: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, widths[0], 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.stages: list[str] = []
        before = widths[0]
        for number, width in enumerate(widths, start=1):
            blocks = []
            for position in range(depth):
                blocks.append(Residual(before, width, 2 if number > 1 and position == 0 else 1, pad))
                before = width
            self.stages.append(f"layer{number}")
            self.add_module(self.stages[-1], nn.Sequential(*blocks))
        self.embed_dim = widths[-1]

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for stage in self.stages for block in self.get_submodule(stage).children()]

    def features(self, inputs: Tensor) -> Tensor:
        hidden = F.relu(self.bn1(self.conv1(inputs)))  # (B, W, H, W)
        for stage in self.stages:
            hidden = self.get_submodule(stage)(hidden)
        return hidden.mean((2, 3))


def slim_resnet18(input_shape: tuple[int, ...], width: int = 20) -> Backbone:
    """ResNet-18 with few channels and a stem for small images, as in GEM and ER (1.1 million parameters).

    Args:
        input_shape: (channels, height, width).
        width: channels of the first stage, > 0; the features have 8 times as many.
    """
    channels, _, _ = image_shape(input_shape, "slim_resnet18")
    require("width", width, width > 0, "> 0")
    return ResNet(channels, [width, 2 * width, 4 * width, 8 * width], depth=2, pad=False)


def cnn(input_shape: tuple[int, ...], width: int = 20) -> Backbone:
    """The convolutional network to start with: `slim_resnet18` by a shorter name.

    Args:
        input_shape: (channels, height, width).
        width: channels of the first stage, > 0; the features have 8 times as many.
    """
    return slim_resnet18(input_shape, width)


def resnet20(input_shape: tuple[int, ...], weights: str = "random", normalize: Normalize | None = None) -> Backbone:
    """CIFAR ResNet-20 (0.27 million parameters, 64 features).

    Args:
        input_shape: (channels, height, width).
        weights: "random", or the path of a .safetensors file whose tensors are named as akamaster's.
        normalize: images in [0, 1] first, by the mean and deviation of imagenet (as those weights need), or by a half;
            null: as the config.json beside the weights says, if there is one, else none.
    """
    return _cifar(input_shape, 3, weights, normalize, "resnet20")


def resnet32(input_shape: tuple[int, ...], weights: str = "random", normalize: Normalize | None = None) -> Backbone:
    """CIFAR ResNet-32 (0.46 million parameters, 64 features).

    Args:
        input_shape: (channels, height, width).
        weights: "random", or the path of a .safetensors file whose tensors are named as akamaster's.
        normalize: images in [0, 1] first, by the mean and deviation of imagenet (as those weights need), or by a half;
            null: as the config.json beside the weights says, if there is one, else none.
    """
    return _cifar(input_shape, 5, weights, normalize, "resnet32")


def _cifar(input_shape: tuple[int, ...], depth: int, weights: str, normalize: Normalize | None, name: str) -> Backbone:
    channels, _, _ = image_shape(input_shape, name)
    net = ResNet(channels, [16, 32, 64], depth, pad=True)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
    if weights != "random":
        state = _weights.read(weights)
        # A checkpoint may lack the batch counters, which batch norm reads only when its momentum is None.
        state.update(
            {k: v for k, v in net.state_dict().items() if k.endswith("num_batches_tracked") and k not in state}
        )
        _weights.fit(net, state, weights, spare=lambda key: key.startswith("linear."))
    return net.normalizing(normalize, channels, _weights.statistics(weights))
