"""Which samples a memory of recent, certain ones keeps, balanced over predicted classes.

Source   Yuan, Xie, Li, "Robust Test-Time Adaptation in Dynamic Scenarios", CVPR 2023, arXiv:2303.13899, equations 4-6.
"""

from __future__ import annotations

import math
from collections.abc import Iterable


def heuristic(age: float, uncertainty: float, size: int, classes: int) -> float:
    """How dispensable a sample is: old or uncertain. `uncertainty` in nats."""
    return 1 / (1 + math.exp(-age / size)) + uncertainty / math.log(classes)


def place(held: list[list[float]], new: list[list[float]], size: int, classes: int) -> list[int]:
    """Which samples a memory holds after taking `new` one by one: indices into held + new, in order of arrival.

    Args:
        held: [predicted class, uncertainty, age] of each sample held; a list with all ages afterwards is left in it.
        new: the same of those that come, with age 0.
        size: N of the memory.
        classes: C.
    """
    items, kept = held + new, list(range(len(held)))
    for number in range(len(held), len(items)):
        label, uncertainty, _ = items[number]
        counts: dict[float, int] = {}
        for k in kept:
            counts[items[k][0]] = counts.get(items[k][0], 0) + 1
        rivals: Iterable[float] = ()
        if counts.get(label, 0) >= size / classes:
            rivals = (label,)
        elif len(kept) >= size:
            most = max(counts.values())
            rivals = sorted(c for c, n in counts.items() if n == most)
        takes = True
        if rivals:
            among = [k for c in rivals for k in kept if items[k][0] == c]
            scores = [heuristic(items[k][2], items[k][1], size, classes) for k in among]
            worst = max(range(len(among)), key=lambda i: (scores[i], i))
            takes = scores[worst] > heuristic(0, uncertainty, size, classes)
            if takes:
                kept.remove(among[worst])
        if takes:
            kept.append(number)
        for k in kept:
            items[k][2] += 1
    held[:] = [items[k] for k in kept]
    return kept
