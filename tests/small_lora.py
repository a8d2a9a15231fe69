"""A small transformer with adapters, and what they do computed by hand."""

import torch

from clplat.adapters import LoRA
from clplat.backbones.vit import vit_micro


def tiny_vit():
    torch.manual_seed(0)
    return vit_micro((3, 8, 8), patch_size=4, dim=16, depth=2, heads=2)


def make(where="ffn", backbone=None, **options):
    backbone = tiny_vit() if backbone is None else backbone
    return backbone, LoRA(backbone, where, **{"rank": 2, "alpha": 3.0, **options})


def stirred(lora, *adapters, seed=1):
    """Give adapters factors that change something."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for adapter in adapters:
            for p in lora.parameters_of(adapter):
                p.copy_(torch.randn(p.shape, generator=generator))


def changed_by_hand(lora, names, scale):
    """A copy of the plain backbone, in float64, with Σ s B A added to the weights."""
    plain = tiny_vit().double()
    with torch.no_grad():
        for adapter in names:
            for name, (a, b) in lora.factors(adapter).items():
                plain.get_submodule(name).weight += scale * b.double() @ a.double()
    return plain


X = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5))
