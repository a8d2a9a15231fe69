"""Batch normalisation whose statistics can be changed after training, and gains and offsets of normalisation layers.

Shapes: G groups, B samples of a group, C channels.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from clplat.errors import UserError

Statistics = Literal["source", "batch", "blend", "follow"]
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_ACTING = ("timm.layers.norm_act", "BatchNormAct2d")  # module and name of timm's, which drops out and activates behind
# Parts of the names of those that libraries have of their own, transformers one for each family (LlamaRMSNorm).
_OWN = ("rmsnorm", "layernorm")
_AFFINE = (_BatchNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)


@dataclass
class _Batch:
    """How the batch that is being run is made up: of groups with statistics of their own, or a part of a larger one."""

    groups: int = 1
    shared: bool = False  # with the other processes
    follow: bool = False  # running statistics that follow take it in


_now = _Batch()


@contextmanager
def batch_of(*, groups: int = 1, shared: bool = False, follow: bool = False) -> Iterator[None]:
    """Within it a batch is `groups` batches one after the other, and running statistics take it in if they `follow`.

    `shared`: it is this process's part of a larger one. Every process must then run the same layers, both ways.
    """
    before = _now.groups, _now.shared, _now.follow
    _now.groups, _now.shared, _now.follow = groups, shared, follow
    try:
        yield
    finally:
        _now.groups, _now.shared, _now.follow = before


class BatchNorm(_BatchNorm):
    """Takes the place of a batch normalisation of torch, with its tensors, and its behaviour until `statistics` is set.

    Of one of timm's, too, which is followed by a dropout and an activation within itself.

    statistics: what normalises while adapting, or None.
        source: the running statistics, which stay.
        batch: those of the batch; with one value per channel, which has no variance, the running ones.
        blend: (1 − share) running + share batch; the running ones stay.
        follow: the running ones; where the batch is to be followed as blend, which also becomes the running statistics.
    share: of the batch, in [0, 1]. Variances are the biased ones, as torch normalises by.
    """

    statistics: Statistics | None
    share: float
    running_mean: Tensor
    running_var: Tensor

    @classmethod
    def instead_of(cls, layer: _BatchNorm) -> BatchNorm:
        """A layer that shares the parameters and buffers of `layer`."""
        if not _plain(layer):
            raise UserError(f"backbone: {type(layer).__name__} is no plain batch normalisation, so it can't be adapted")
        if layer.running_mean is None or layer.running_var is None:
            raise UserError(
                "backbone: its batch normalisation keeps no running statistics, so there is no source model"
            )
        new = cls.__new__(cls)
        new.__dict__.update({k: copy.copy(v) for k, v in vars(layer).items()})
        new.__dict__.update(statistics=None, share=1.0)
        return new

    def _check_input_dim(self, input: Tensor) -> None:
        if input.dim() < 2:
            raise ValueError(f"batch normalisation takes (B, C, ...), got {tuple(input.shape)}")

    def forward(self, input: Tensor) -> Tensor:
        out = self._normalised(input)
        for behind in self.children():
            out = behind(out)
        return out

    def _normalised(self, input: Tensor) -> Tensor:
        values = input.numel() // self.num_features
        if self.statistics is None:
            if self.training and _now.shared:
                return self._follow_shared(input)
            if self.training and values == 1:  # which torch refuses
                return self._single(input)
            return super().forward(input)
        still = self.statistics == "source" or (self.statistics == "follow" and not _now.follow)
        if still or (not _now.shared and values <= _now.groups):
            return self._normalise(input, self.running_mean, self.running_var)
        if self.statistics == "batch" and not _now.shared:
            parts = [
                F.batch_norm(x, None, None, self.weight, self.bias, True, 0.0, self.eps) for x in self._split(input)
            ]
            return parts[0] if len(parts) == 1 else torch.cat(parts)
        outputs = []
        for part in self._split(input):
            mean, var, _ = _moments(part)
            if self.statistics != "batch":
                mean = (1 - self.share) * self.running_mean + self.share * mean
                var = (1 - self.share) * self.running_var + self.share * var
            if self.statistics == "follow" and bool(mean.isfinite().all() & var.isfinite().all()):
                self.running_mean.copy_(mean.detach())
                self.running_var.copy_(var.detach())
            outputs.append(self._normalise(part, mean, var))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _split(self, input: Tensor) -> tuple[Tensor, ...]:
        return (input,) if _now.groups == 1 else input.chunk(_now.groups)

    def _normalise(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        if not (mean.requires_grad or var.requires_grad):
            return F.batch_norm(x, mean, var, self.weight, self.bias, False, 0.0, self.eps)
        scale, shape = (var + self.eps).rsqrt(), (1, -1, *[1] * (x.dim() - 2))
        out = (x - mean.view(shape)) * scale.view(shape)
        return out if self.weight is None else out * self.weight.view(shape) + self.bias.view(shape)

    def _follow_shared(self, input: Tensor) -> Tensor:
        """Training as torch does it, over the samples of all processes."""
        mean, var, count = _moments(input.to(torch.promote_types(input.dtype, torch.float32)))
        if count <= 1:
            return self._single(input)
        with torch.no_grad():
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            momentum = self.momentum if self.momentum is not None else 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.detach(), momentum)
            self.running_var.lerp_(var.detach() * (count / (count - 1).clamp(min=1)), momentum)
        return self._normalise(input, mean, var).to(input.dtype)

    def _single(self, input: Tensor) -> Tensor:
        """A training batch of one value per channel, which has no variance: by the running statistics, which stay."""
        warnings.warn(
            "a training batch holds one sample: batch normalisation takes its running statistics for it",
            stacklevel=2,
        )
        return self._normalise(input, self.running_mean, self.running_var)


class _Sum(torch.autograd.Function):
    """Sum over processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        torch.distributed.all_reduce(total)
        return total


def _moments(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (C,), biased variance (C,) and count () over all but the channels, of all processes if the batch is shared.

    The variance is taken around the mean of each process first, then put together, so that no digits are lost.
    """
    dims = [d for d in range(x.dim()) if d != 1]
    count = x.new_tensor(float(x.numel() // x.shape[1]))
    if x.numel():
        var, mean = torch.var_mean(x, dims, correction=0)
    else:
        var, mean = x.sum(dims), x.sum(dims)  # zeros, with a gradient
    if not _now.shared:
        return mean, var, count
    packed = _Sum.apply(torch.cat([mean * count, count.view(1)]))
    whole, total = packed[:-1] / packed[-1], packed[-1].detach()
    return whole, _Sum.apply(count * (var + (mean - whole) ** 2)) / total, total


def _plain(layer: _BatchNorm) -> bool:
    """Whether `BatchNorm` can do what it does."""
    return type(layer) in _PLAIN or (type(layer).__module__, type(layer).__qualname__) == _ACTING


def make_adaptable(model: nn.Module) -> int:
    """Put `BatchNorm` in the place of every batch normalisation in `model`; returns how many there are.

    Names, parameters and buffers stay, so weights load as before.

    Raises:
        UserError: one is of a class of its own, or keeps no running statistics.
    """
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, _BatchNorm)]
    for name, layer in found:
        if not isinstance(layer, BatchNorm):
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, BatchNorm.instead_of(layer))
    return len(found)


def prepare_training(model: nn.Module, processes: int) -> None:
    """Put `BatchNorm` in the place of torch's batch normalisations: it trains on one sample, and over processes.

    A class of its own, and layers without running statistics, are left as they are.

    Raises:
        UserError: such a layer among several processes, each of which would normalise by its own part of a batch.
    """
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm)]:
        if _plain(layer) and layer.running_mean is not None and layer.running_var is not None:
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, BatchNorm.instead_of(layer))
        elif processes > 1 and not isinstance(layer, BatchNorm):
            raise UserError(
                f"fabric.devices: {processes}, but {name} ({type(layer).__name__}) can't take its statistics over "
                "processes (valid: 1, or torch's BatchNorm with running statistics)"
            )


def set_statistics(model: nn.Module, statistics: Statistics | None, share: float = 1.0) -> None:
    """Set what the batch normalisations of `model` normalise by."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.statistics, module.share = statistics, share


def norm_affine(model: nn.Module) -> list[nn.Parameter]:
    """Gains and offsets of all normalisation layers, told by the type of the layer, in the order of the modules."""
    return [p for m in model.modules() if _normalises(m) for p in m.parameters(recurse=False)]


def _normalises(module: nn.Module) -> bool:
    """Whether it is a normalisation layer: torch's, or a library's own of a gain and an offset at most."""
    if isinstance(module, _AFFINE):
        return True
    named = any(part in type(module).__name__.lower() for part in _OWN)
    own = {name for name, _ in module.named_parameters(recurse=False)}
    return named and own <= {"weight", "bias"} and not any(True for _ in module.children())
