"""A small HNET."""

import torch

from clplat.strategies.hnet import HNet

SMALL = {"embedding": 4, "chunk": 25, "chunk_embedding": 3, "hidden": [6]}  # 98 weights: 4 pieces, the last one cut


def make(model, **options):
    torch.manual_seed(0)
    return HNet(model=model(), **{**SMALL, "lr": 0.05, "beta": 0.5, **options})


def tensors(strategy):
    return {k: v.clone() for k, v in strategy.state_dict().items() if isinstance(v, torch.Tensor)}
