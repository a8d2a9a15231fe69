"""Passes compiled by torch: the blocks of a backbone, or all of one that has none or convolves.

Blocks of one make share their kernels, which adapters, another mode or frozen weights have made anew; heads that grow
are not of them. A pass that is watched or rewritten on its way (hooks, modes, transforms of torch.func) is not
compiled: what was compiled without them would leave them out.

Source   Ansel et al., "PyTorch 2: Faster Machine Learning Through Dynamic Python Bytecode Transformation and Graph
         Compilation", ASPLOS 2024, doi:10.1145/3620665.3640366; here by torch.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from clplat.backbones.base import Backbone
from clplat.backbones.frozen import Frozen
from clplat.config.settings import Config
from clplat.strategy import Strategy
from clplat.stream import Kind, Stream

KEY = "fabric.compile"
LIMIT = 4096  # kernels of a part, for as many structures that it has in a run; torch's own 8 end compiling in silence
# Any number of samples by one kernel, and the random numbers (dropout) of the pass that is not compiled.
OPTIONS: dict[str, Any] = {"dynamic": True, "options": {"fallback_random": True}}


def faults(config: Config, strategy: Strategy, stream: Stream) -> list[str]:
    """Why passes can't be compiled, one line each."""
    if not config.fabric.compile:
        return []
    found = []
    backbone = getattr(strategy.model, "backbone", None)
    if config.fabric.strategy == "fsdp":
        found.append("fabric.strategy is fsdp, which brings weights together within a pass")
    if config.loop.activation_checkpointing:
        found.append("loop.activation_checkpointing computes passes again that must be the same")
    if any(e.kind is Kind.INTERACT for e in stream):
        found.append("an agent asks its networks one by one")
    elif isinstance(backbone, Frozen):
        found.append(f"backbone {config.backbone.name} has no passes to train")
    elif not isinstance(backbone, Backbone) or any(_rewritten(part) for part in parts(backbone)):
        found.append(f"{type(strategy).__name__} makes the passes of its model in a way of its own")
    return [f"{KEY}: true, but {why} (valid: false)" for why in found]


def check(device: torch.device) -> list[str]:
    """The fault of a machine that torch can't compile on: a compiler is missing, say. It is tried, in some seconds."""
    try:
        torch.compile(_tried, **OPTIONS)(torch.ones(2, device=device))
    except Exception as error:  # noqa: BLE001 - whatever compilers raise
        lines = (line for line in str(error).splitlines() if line.strip() and not line.endswith("raised:"))
        what = next(lines, type(error).__name__)
        return [f"{KEY}: true, but torch can't compile for {device.type} here: {what.strip()} (valid: false)"]
    return []


def _tried(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def compile_passes(backbone: Backbone) -> None:
    """Compile what of a backbone is not yet; names of weights stay, and copies of it are not compiled."""
    import torch._dynamo.config as limits

    limits.recompile_limit = limits.accumulated_recompile_limit = LIMIT
    limits.fail_on_recompile_limit_hit = True
    for part in parts(backbone):
        if part._compiled_call_impl is None:
            part.compile(**OPTIONS)
            part._compiled_call_impl = partial(_passed, part, part._compiled_call_impl)


def parts(backbone: Backbone) -> list[nn.Module]:
    """What is compiled, each by itself: blocks keep their kernels few; a convolutional network has few alike."""
    blocks = backbone.blocks
    convolves = any(isinstance(m, nn.Conv2d | nn.Conv3d) for block in blocks for m in block.modules())
    return [backbone] if convolves or not blocks else blocks


def _passed(part: nn.Module, compiled: Any, *args: Any, **more: Any) -> Any:
    return part._call_impl(*args, **more) if _watched(part) else compiled(*args, **more)


def _watched(part: nn.Module) -> bool:
    """Whether hooks, modes or transforms see this pass."""
    c: Any = torch._C
    return bool(
        c._len_torch_dispatch_stack()
        or c._len_torch_function_stack()
        or c._functorch.peek_interpreter_stack() is not None
        or _rewritten(part)
        or any(
            m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
            for m in part.modules()
        )
    )


def _rewritten(part: nn.Module) -> bool:
    """Whether a module in it has got another forward pass than its class has."""
    return any("forward" in m.__dict__ for m in part.modules())
