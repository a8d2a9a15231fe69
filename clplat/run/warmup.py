"""The warm-up of a process: what torch does once, at first steps, and no run's training time should carry."""

from __future__ import annotations

import time

import torch
import torch.nn.functional as F

from clplat.lightning import Fabric
from clplat.metrics.cost import step_flops

_warm = set[str]()  # devices that this process has trained on


def warm_up(fabric: Fabric) -> float:
    """Take a few training steps of a tiny model of zeros on the device; seconds they took, 0 in a warm process.

    They load what torch loads late (optimizers, the count of operations, libraries and kernels of the device). Draws
    no random number. What a model needs beyond (kernels chosen for its shapes, a compiler) stays with its first step.
    """
    if str(fabric.device) in _warm:
        return 0.0
    _warm.add(str(fabric.device))
    started = time.perf_counter()
    shapes = ((4, 1, 3, 3), (4,), (8, 64), (8,))
    kernel, offset, weight, bias = (torch.zeros(s, device=fabric.device, requires_grad=True) for s in shapes)
    inputs = torch.zeros(8, 1, 6, 6, device=fabric.device)
    labels = torch.zeros(8, dtype=torch.long, device=fabric.device)
    for make in (torch.optim.SGD, torch.optim.AdamW):
        optimizer = make([kernel, offset, weight, bias], lr=0.1)

        def step(optimizer: torch.optim.Optimizer = optimizer) -> None:
            with fabric.autocast():
                hidden = F.relu(F.conv2d(inputs, kernel, offset)).flatten(1)
                loss = F.cross_entropy(F.linear(hidden, weight, bias), labels)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([weight], 1.0)
            optimizer.step()
            optimizer.zero_grad()
            loss.item()  # waits for the device

        step_flops(step)
        step()
    return time.perf_counter() - started
