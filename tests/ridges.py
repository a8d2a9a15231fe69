"""Data, a learner and the normal equations for the tests of ridge regression."""

import numpy as np
import torch

from clplat.components.ridge import Ridge

D, C, N = 24, 4, 60  # features, classes, samples
WAYS = [{}, {"inverse": True}, {"per_class": True}, {"inverse": True, "per_class": True}]


def data(n=N, d=D, classes=C, seed=0, bits=14):
    """Features (n, d), non-negative as after a relu, on the grid of `bits`; labels (n,)."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.relu(torch.randn(n, d, generator=draw, dtype=torch.float64) + 0.3)
    x = x if bits is None else torch.round(x * 2**bits) / 2**bits
    return x, torch.randint(classes, (n,), generator=draw)


def learner(x=None, y=None, *, gamma=0.1, classes=C, **options):
    ridge = Ridge(D if x is None else x.shape[1], gamma, **options)
    ridge.grow(classes)
    if x is not None:
        ridge.add(x, y)
        ridge.close()
    return ridge


def reference(x, y, gamma=0.1, classes=C):
    """W by NumPy, from the samples themselves."""
    h, targets = x.numpy(), np.eye(classes)[y.numpy()]
    return np.linalg.solve(h.T @ h + gamma * np.eye(h.shape[1]), h.T @ targets)


def off(weight, expected):
    """Relative Frobenius distance."""
    expected = torch.as_tensor(expected)
    return float((weight - expected).norm() / expected.norm().clamp(min=1e-300))


def without(y, rows):
    kept = torch.ones(len(y), dtype=torch.bool)
    kept[rows] = False
    return kept
