"""Learning rate schedules within an experience."""

from __future__ import annotations

import math


def rate_factor(done: int, planned: int, schedule: str, warmup: float) -> float:
    """What the learning rate of the coming step is multiplied by, in [0, 1].

    Args:
        done: steps of the experience taken.
        planned: steps it will take.
        schedule: after the warm-up, constant, or cosine: half a cosine to zero.
        warmup: share of `planned` over which the factor rises linearly.
    """
    rising = warmup * planned
    if done < rising:
        return min((done + 1) / rising if rising >= 1 else 1.0, 1.0)
    if schedule == "cosine":
        return 0.5 * (1 + math.cos(math.pi * min(1.0, (done - rising) / max(1.0, planned - rising))))
    return 1.0
