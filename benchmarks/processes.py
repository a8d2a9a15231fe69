"""A step of ViT-tiny on two processes (gloo), through clplat and by a DDP loop by hand: wall time, since both wait.

Each process has a core, and takes half of every batch; losses are those of the first.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from benchmarks.in_turn import Hand, compare
from benchmarks.networks import RATE, sides
from benchmarks.real import vit
from benchmarks.timing import Row

PROCESSES, LIMIT = 2, 1 / 0.9  # of the time of a step: 0.9 of the throughput


class Halved(Hand):
    """One process of the loop by hand."""

    def batches(self, number: int) -> Iterable[Tensor]:
        rank = torch.distributed.get_rank()
        return [rows.tensor_split(PROCESSES)[rank] for rows in super().batches(number)]


def measured(fabric: Any, *given: bool) -> Row:
    """The row, in each of the processes."""
    torch.set_num_threads(1)
    (quick,) = given
    pair, work = vit(quick)
    ours, _ = sides(pair, "naive", work, fabric=fabric)
    net = DistributedDataParallel(pair.net)
    hand = Halved(net, pair.loss, work, lambda parameters: torch.optim.SGD(parameters, lr=RATE))
    for side in (ours, hand):
        side.meter.read = lambda: 1000 * time.perf_counter()
    return compare("step, vit_tiny, naive, two processes", ours, hand, None if quick else LIMIT)


def rows(quick: bool = False) -> list[Row]:
    """One row."""
    from clplat.config.settings import FabricSettings
    from clplat.run.launch import make_fabric

    fabric = make_fabric(FabricSettings(accelerator="cpu", devices=PROCESSES, strategy="ddp"))
    before = set(os.environ)
    row: Row = fabric.launch(measured, quick)
    for key in set(os.environ) - before:  # the launcher leaves its port
        del os.environ[key]
    return [row]
