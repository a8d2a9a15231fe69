"""In which order corruptions come, and the samples within them.

Sources: Wang et al., "CoTTA", CVPR 2022, arXiv:2203.13591 (continual, gradual, its ten orders); Döbler et al., "RMT",
CVPR 2023, arXiv:2211.13081, and mariodoebler/test-time-adaptation (MIT) (the other gradual one, mixed, correlated);
Yuan et al., "RoTTA", CVPR 2023, arXiv:2303.13899 (labels by Dirichlet draws).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from clplat.data.worlds import generator

_UP_AND_DOWN = (1, 2, 3, 4, 5, 4, 3, 2, 1)
MOST_SLOTS = 100


@dataclass(frozen=True)
class Visit:
    """One experience to come: which (corruption, severity) it mixes, in which round."""

    name: str
    segments: tuple[tuple[str, int], ...]
    round: int


def visits(order: str, names: Sequence[str], severity: int, rounds: int) -> list[Visit]:
    """What is visited, one after the other.

    Args:
        order: continual, correlated: one experience a corruption. gradual: severity rises to 5 and falls, starting at 5
            for the first corruption (CoTTA). gradual_full: it rises and falls for every one (RMT). mixed,
            mixed_correlated: all in one.
        severity: of the corruptions, where it does not rise and fall.
    """
    found = []
    for turn in range(rounds):
        suffix = f"_r{turn + 1}" if rounds > 1 else ""
        if order.startswith("mixed"):
            found.append(Visit(f"mixed{suffix}", tuple((name, severity) for name in names), turn))
            continue
        for position, name in enumerate(names):
            ramp: tuple[int, ...] = (severity,)
            if order.startswith("gradual"):
                first = position == 0 and turn == 0 and order == "gradual"
                ramp = _UP_AND_DOWN[4:] if first else _UP_AND_DOWN
            for step, level in enumerate(ramp, 1):
                place = f"_{step}_severity_{level}" if len(ramp) > 1 else ""
                found.append(Visit(f"{name}{place}{suffix}", ((name, level),), turn))
    return found


def sample_order(
    labels: np.ndarray, segments: int, *, shuffle: bool, concentration: float | None, seed: int, index: int
) -> np.ndarray:
    """Order (segments · n,) int64 in which samples come; sample s · n + i is image i in segment s.

    Args:
        labels: (n,) of the images.
        shuffle: else one image after the other, segment by segment.
        concentration: of the Dirichlet draws that correlate labels; 0 sorts by label; None does neither.
        index: of the experience; another one, another order.
    """
    rng, count = generator(seed, "adapt_order", index), segments * len(labels)
    order = rng.permutation(count) if shuffle else np.arange(count)
    if concentration is None:
        return order
    return order[correlated(labels[order % len(labels)], concentration, rng)]


def correlated(labels: np.ndarray, concentration: float, rng: np.random.Generator) -> np.ndarray:
    """Positions (n,) so that the labels at them come in runs.

    There are as many slots as classes (at most 100). Each class spreads its samples over the slots by a draw from a
    symmetric Dirichlet distribution; slots follow one another, and in a slot the classes, in drawn order.
    """
    classes = rng.permutation(np.unique(labels))
    if concentration == 0:
        return np.concatenate([np.flatnonzero(labels == c) for c in classes])
    slots: list[list[np.ndarray]] = [[] for _ in range(min(len(classes), MOST_SLOTS))]
    for c in classes:
        rows = np.flatnonzero(labels == c)
        shares = rng.dirichlet(np.full(len(slots), concentration))
        ends = np.round(np.cumsum(shares)[:-1] * len(rows)).astype(int)
        for slot, piece in zip(slots, np.split(rows, ends), strict=True):
            slot.append(piece)
    return np.concatenate([slot[i] for slot in slots for i in rng.permutation(len(slot))])
