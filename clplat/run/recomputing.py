"""Activation checkpointing: what is within the blocks of a backbone is computed again in the backward pass, not kept.

Source   Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016, arXiv:1604.06174; here by torch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from clplat.backbones.base import Backbone
from clplat.config.settings import Config
from clplat.strategy import Strategy

KEY = "loop.activation_checkpointing"


def faults(config: Config, cls: type[Strategy], strategy: Strategy) -> list[str]:
    """Why passes can't be computed again, one line each: a second pass must meet the module as the first did."""
    if not config.loop.activation_checkpointing:
        return []
    backbone = getattr(strategy.model, "backbone", None)
    found = []
    if not cls.__dict__.get("plain_passes"):
        found.append(f"{KEY}: true, but {cls.__name__} has not been seen to learn the same with it (valid: false)")
    if not (isinstance(backbone, Backbone) and backbone.shardable):
        known = "language_model, text_encoder, vit, clip"
        found.append(f"{KEY}: true, but backbone {config.backbone.name} keeps its activations (valid: {known})")
    return found


def recompute(backbone: Backbone) -> None:
    """Let its blocks keep their inputs alone. Random states are put back for the second pass: dropout is the same."""
    for block in backbone.blocks:
        block.forward = functools.partial(_again, block.forward)


def _again(forward: Callable[..., Any], *args: Any, **more: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **more)
    return checkpoint(forward, *args, use_reentrant=False, **more)
