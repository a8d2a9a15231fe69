"""Naive: plain fine-tuning on whatever comes; the lower bound that every method has to beat.

Source   as "fine-tuning" in McCloskey, Cohen, "Catastrophic Interference in Connectionist Networks", 1989.
    loss = CE(f(x; θ), y)
"""

from __future__ import annotations

from torch import Tensor

from clplat import Kind, Strategy


class Naive(Strategy):
    """Fine-tuning: no memory, no penalty. Shapes: B new samples."""

    kinds = frozenset({Kind.LEARN})
    paper = "doi:10.1016/S0079-7421(08)60536-8"
    unshardable = ""
    plain_passes = True

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch  # (B, ...), (B,)
        return self.mean_loss(x, y)
