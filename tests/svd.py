"""Split layers, and their parts by NumPy."""

import numpy as np
import torch
from torch import nn

from clplat.adapters.split import SplitLinear


def split(shape=(7, 5), k=2, block="factored", dtype=torch.float32, seed=0):
    """A split layer and the weight it had."""
    torch.manual_seed(seed)
    layer = SplitLinear(nn.Linear(shape[1], shape[0], dtype=dtype), block)
    before = layer.weight.detach().clone()
    layer.split(k)
    return layer, before


def effective(layer):
    return (layer.weight + (layer.left * layer.scale) @ layer.right if len(layer.scale) else layer.weight).detach()


def svd(weight, k):
    """U_h, S_h, V_h, U_l, S_l, V_l in double precision, by NumPy."""
    u, s, vt = np.linalg.svd(weight.double().numpy(), full_matrices=False)
    return u[:, :k], s[:k], vt[:k].T, u[:, k:], s[k:], vt[k:].T
