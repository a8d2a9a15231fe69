"""The weights that a backbone's adaptable layers compute with, whatever adapters they carry."""

from __future__ import annotations

from typing import Any, get_args

import torch
from torch import Tensor

from clplat.backbones.base import Backbone, Role
from clplat.errors import UserError


@torch.no_grad()
def effective_weights(backbone: Backbone) -> dict[str, Tensor] | None:
    """W + Σ s B A (rows, columns) of each adaptable layer over the low-rank adapters in use, in float32 at least.

    A layer fused of query, key and value of equal size is three matrices. None where there are no such layers, or one
    carries a change that is no low-rank adapter.
    """
    found: dict[str, Tensor] = {}
    try:
        layers = {name: layer for role in get_args(Role) for name, layer in backbone.layers(role).items()}
    except UserError:  # fused into tensors that are no linear layers
        return None
    for name, layer in layers.items():
        outer: Any = backbone.get_submodule(name)
        weight = layer.weight.to(torch.promote_types(layer.weight.dtype, torch.float32), copy=True)
        if outer is not layer:
            if not hasattr(outer, "lora_A"):
                return None
            for adapter in outer.active_adapters:
                if adapter in outer.lora_A:
                    up, down = outer.lora_B[adapter].weight, outer.lora_A[adapter].weight
                    weight += outer.scaling[adapter] * (up.to(weight.dtype) @ down.to(weight.dtype))
        rows, columns = weight.shape
        fused = backbone.projection(name) == "qkv" and rows == 3 * columns
        parts = zip(("query", "key", "value"), weight.chunk(3), strict=True) if fused else [("", weight)]
        found |= {f"{name}.{part}".rstrip("."): matrix.clone() for part, matrix in parts}
    return found or None
