"""Weights of which each process holds a part: FSDP2 of torch, for models that do not fit on one device.

The blocks of a backbone are sharded each, then the rest of it. A pass brings a block together and lets it go again, and
its gradients are averaged part by part. What is not of the backbone, or grows later, is small (a head, adapters,
memories): every process holds it whole, and its gradients are averaged here, as DDP would.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.fabric.strategies import DDPStrategy
from torch import Tensor, nn

from clplat.backbones.base import Backbone
from clplat.components.shards import is_sharded, parted
from clplat.config.resolve import DEFAULTS
from clplat.config.settings import Config
from clplat.lightning import Fabric
from clplat.metrics.representation import gradient_norm
from clplat.strategy import Strategy, why_not_sharded
from clplat.stream import Kind, Stream

# What is asked of a backbone beside its forward pass, and reads its weights.
_PASSES = ("features", "answer_logits", "answer_scores", "generate", "text_features", "scale")


class Sharded(DDPStrategy):
    """Processes as of DDP, on a learner that `shard` has been given: there is nothing to wrap."""

    def setup_module(self, module: nn.Module) -> Any:
        """The module itself; every process gets what it holds whole as process 0 has it, as by DDP."""
        whole: list[Tensor] = [t for t in (*module.parameters(), *module.buffers()) if not is_sharded(t)]
        for tensor in whole:
            sent = tensor.detach().contiguous()
            torch.distributed.broadcast(sent, 0)
            if not tensor.is_contiguous():
                tensor.detach().copy_(sent)
        return module

    def setup_optimizer(self, optimizer: Any) -> Any:
        """The optimizer itself, tensor by tensor: torch's faster loops take sharded and whole ones not together."""
        for group in optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = False
        return optimizer

    def clip_gradients_norm(
        self, module: nn.Module, optimizer: Any, max_norm: float | int, *args: Any, **more: Any
    ) -> Tensor:
        """As torch's, by the norm of all parts together."""
        own = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        norm = gradient_norm(own)
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        for parameter in own:
            grad: Any = parameter.grad
            getattr(grad, "_local_tensor", grad).mul_(factor.to(grad.dtype))
        return norm


def sharding(fabric: Fabric) -> bool:
    """Whether the run's weights are sharded."""
    return isinstance(fabric.strategy, Sharded)


def faults(config: Config, cls: type[Strategy], strategy: Strategy, stream: Stream) -> list[str]:
    """Why what is asked for can't be run on sharded weights, one line each."""
    if config.fabric.strategy != "fsdp":
        valid = "valid: false, or fabric.strategy fsdp"
        return [f"loop.checkpoint_sharded: true, but no weights are sharded ({valid})"] * config.loop.checkpoint_sharded
    backbone = getattr(strategy.model, "backbone", None)
    found = []
    if why := why_not_sharded(cls):
        found.append(f"fabric.strategy: fsdp, but {cls.__name__} can't learn by sharded weights: {why} (valid: ddp)")
    if not (isinstance(backbone, Backbone) and backbone.shardable):
        known = "language_model, text_encoder, vit, clip"
        found.append(f"fabric.strategy: fsdp, but backbone {config.backbone.name} is not sharded (valid: {known})")
    elif cls.needs_classes and not backbone.needs_head and backbone.reads_tokens:
        found.append(
            f"fabric.strategy: fsdp, but {cls.__name__} scores all classes in training, in as many passes as a "
            f"process's texts are long (valid: a strategy that takes the answers' own loss, or ddp)"
        )
    kinds = {e.kind for e in stream}
    if other := ", ".join(sorted(kinds - {Kind.LEARN, Kind.FORGET})):
        found.append(f"fabric.strategy: fsdp, but the stream has experiences of kind {other} (valid: learn, forget)")
    if Kind.FORGET in kinds and config.audit.enabled and config.audit.relearn_steps:
        steps = config.audit.relearn_steps
        found.append(
            f"audit.relearn_steps: {steps}, taken on a copy of whole weights, but fabric.strategy is fsdp (valid: 0)"
        )
    if config.merge.name != DEFAULTS["merge"]:
        found.append(f"merge: {config.merge.name} changes whole weights, but fabric.strategy is fsdp (valid: none)")
    if config.loop.diagnostics:
        found.append("loop.diagnostics: they are of whole weights, but fabric.strategy is fsdp (valid: [])")
    return found


def shard(strategy: Strategy, device: torch.device) -> None:
    """Leave each process its part of the backbone, and of copies of it, moved to `device` block by block."""
    from torch.distributed.device_mesh import init_device_mesh

    # Said of any block whose output is a view; what is tested ends where one process does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for backbone in [m for m in strategy.modules() if isinstance(m, Backbone)]:
        _split(backbone, _outline(backbone), mesh)


def _split(backbone: Any, outline: Backbone, mesh: Any) -> None:
    """Split one backbone, on which processes have the same weights.

    Args:
        outline: the same without weights, which copies are made of.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    # A number, and what is still empty, can't be split.
    single = {p for p in backbone.parameters() if not p.ndim or not p.numel()}
    for part in (*backbone.blocks, backbone):
        fully_shard(part, mesh=mesh, reshard_after_forward=True, ignored_params=single)
    for module in backbone.modules():
        if isinstance(module, FSDPModule) and mesh.device_type == "cpu":  # gloo knows no averages
            module.set_force_sum_reduction_for_comms(True)
    _gather_in_passes(backbone)
    backbone.__dict__["outline"] = outline, mesh
    type(backbone).__deepcopy__ = _copied  # of a class that FSDP made, and refuses to copy


def _outline(backbone: Backbone) -> Backbone:
    """A copy without the numbers of its parameters."""
    blank = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in backbone.parameters()}
    return copy.deepcopy(backbone, blank)


def _copied(backbone: Any, memo: dict[int, Any]) -> Any:
    """What `copy.deepcopy` gives for a sharded backbone: another, of which each process holds the same part."""
    outline, mesh = backbone.__dict__["outline"]
    new: Any = copy.deepcopy(outline)
    own = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    if own.keys() != {n for n, _ in (*new.named_parameters(), *new.named_buffers())}:
        raise RuntimeError("a backbone that has grown since it was sharded can't be copied")
    _split(new, outline, mesh)
    new.to_empty(device=next(iter(own.values())).device)
    with torch.no_grad():
        for name, value in (*new.named_parameters(), *new.named_buffers()):
            value.copy_(own[name])
    memo[id(backbone)] = new
    return new


def _gather_in_passes(backbone: Any) -> None:
    """Bring weights together in whatever is asked of a backbone, once where one pass calls another."""
    from torch.distributed.fsdp import register_fsdp_forward_method

    inside = [False]

    def outermost(plain: Callable[..., Any], gathering: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(plain)
        def called(*args: Any, **more: Any) -> Any:
            if inside[0]:
                return plain(*args, **more)
            inside[0] = True
            try:
                return gathering(*args, **more)
            finally:
                inside[0] = False

        return called

    backbone.forward = outermost(backbone.forward, backbone.forward)  # around which FSDP's hooks are
    for name in _PASSES:
        if (plain := getattr(backbone, name, None)) is not None:
            register_fsdp_forward_method(backbone, name)
            setattr(backbone, name, outermost(plain, getattr(backbone, name)))


def average_gradients(parameters: Iterable[nn.Parameter], world_size: int) -> None:
    """Average over processes the gradients of what each holds whole; of those that have none counts as zero.

    What no process has a gradient of keeps none, as by DDP.
    """
    own = [p for p in parameters if p.requires_grad and not is_sharded(p)]
    if world_size == 1 or not own:
        return
    met = torch.tensor([p.grad is not None for p in own], dtype=torch.int32, device=own[0].device)
    torch.distributed.all_reduce(met)
    reached = [p for p, count in zip(own, met.tolist(), strict=True) if count]
    for dtype in {p.dtype: None for p in reached}:
        same = [p for p in reached if p.dtype == dtype]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in same])
        torch.distributed.all_reduce(flat)
        flat /= world_size
        for p, grad in zip(same, flat.split([p.numel() for p in same]), strict=True):
            p.grad = grad.view_as(p)


def parted_state(state: dict[str, Any], module: nn.Module) -> dict[str, Any]:
    """A module's whole state, as this process can load it."""
    like = module.state_dict()
    return {name: parted(value, like.get(name)) for name, value in state.items()}


def parted_moments(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """An optimizer's whole state, as this process can load it."""
    own = [p for group in optimizer.param_groups for p in group["params"]]
    moments = {i: {k: parted(v, own[i]) for k, v in of.items()} for i, of in state["state"].items()}
    return state | {"state": moments}
