"""Paired measurements: what stands in one row of the table, and how samples become it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass
class Row:
    """One figure: measured in pairs, one after the other, in one run.

    Args:
        name: what is compared.
        unit: of `ours` and `base`: ms, s, MB.
        ours: median of clplat (or of a peer).
        base: median of the hand-written loop.
        how: "ratio" or "difference" of the pairs, and of the limit.
        pairs: ours against base, pair by pair.
        limit: the largest median allowed; None: for information.
        note: what else was measured.
    """

    name: str
    unit: str
    ours: float
    base: float
    how: str
    pairs: list[float]
    limit: float | None = None
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.pairs)

    @property
    def passed(self) -> bool | None:
        """None where there is no limit."""
        return None if self.limit is None else self.median <= self.limit

    def to_dict(self) -> dict[str, object]:
        """Plain values for the results file; `median`, `min` and `max` are of the pairs."""
        spread = {"median": self.median, "min": min(self.pairs), "max": max(self.pairs), "rounds": len(self.pairs)}
        values = {k: getattr(self, k) for k in ("name", "unit", "ours", "base", "how")}
        return {**values, **spread, "limit": self.limit, "passed": self.passed, "note": self.note}


def paired(
    name: str, unit: str, ours: Sequence[float], base: Sequence[float], how: str, limit: float | None = None,
    note: str = "",
) -> Row:  # fmt: skip
    """A row of samples that were taken in turn: ours[i] next to base[i]."""
    pairs = [a / b if how == "ratio" else a - b for a, b in zip(ours, base, strict=True)]
    return Row(name, unit, statistics.median(ours), statistics.median(base), how, pairs, limit, note)


def clock(device: torch.device) -> Callable[[], float]:
    """What reads milliseconds: the processor's for a CPU; else the wall's, once the device has done all its work."""
    import torch

    if device.type == "cpu":
        return lambda: 1000 * time.process_time()

    def read() -> float:
        torch.accelerator.synchronize(device)
        return 1000 * time.perf_counter()

    return read
