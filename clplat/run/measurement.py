"""What is measured after each experience, beside the accuracy matrix."""

from __future__ import annotations

import torch

from clplat.metrics import cost as costs
from clplat.metrics.representation import measure
from clplat.strategy import Strategy
from clplat.stream import Experience, Stream

_SAMPLES = 512


def health(strategy: Strategy, stream: Stream, experience: Experience) -> dict[str, float | None]:
    """Dormant units, effective rank and weight norm, on at most 512 inputs, held-out ones if there are any."""
    data = next((d for d in (experience.test, experience.valid, experience.train) if d is not None and len(d)), None)
    if data is None:
        return dict.fromkeys(("dormant_fraction", "effective_rank", "weight_norm"))
    device = next(strategy.parameters()).device
    positions = torch.linspace(0, len(data) - 1, min(_SAMPLES, len(data)), device=data.inputs.device).long()
    raw, _ = data.batch(positions)
    return measure(strategy.model, stream.prepare(raw.to(device), False))


def cost(
    strategy: Strategy, device: torch.device, spent: dict[str, float], world_size: int
) -> dict[str, float | int | None]:
    """Cost of the run so far, under the names of the summary.

    Args:
        spent: train_seconds, eval_seconds, train_flops of one process, samples of all.
    """
    seconds = spent["train_seconds"]
    return {
        "train_seconds": seconds,
        "eval_seconds": spent["eval_seconds"],
        "samples_per_second": spent["samples"] / seconds if seconds else None,
        "peak_rss_bytes": costs.peak_rss_bytes(),
        "peak_device_bytes": costs.peak_device_bytes(device),
        "trainable_parameters": costs.trainable_parameters(strategy),
        "stored_bytes": costs.stored_bytes(strategy),
        "train_flops": spent["train_flops"] * world_size,
    }
