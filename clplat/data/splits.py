"""Which rows of a data set an experience gets. Pure functions of labels, options and a NumPy generator.

Shapes: N samples of a data set, n of an experience, C classes.
"""

from __future__ import annotations

import numpy as np

Rows = np.ndarray  # (n,) int64 row numbers


def class_groups(order: np.ndarray, experiences: int, first_classes: int | None) -> list[np.ndarray]:
    """The classes `order` (C,) in `experiences` consecutive groups, as even as can be, larger ones first."""
    if first_classes is None or experiences == 1:
        return np.array_split(order, experiences)
    return [order[:first_classes], *np.array_split(order[first_classes:], experiences - 1)]


def blurred(
    pools: dict[int, Rows], groups: list[np.ndarray], share: float, disjoint: float, rng: np.random.Generator
) -> list[Rows]:
    """Rows of each experience when `share` of each class's samples (rounded down) are dealt to the other experiences.

    `pools` maps a class to its rows, `groups` names the classes of each experience; round(disjoint · C) classes,
    drawn, keep all their samples.
    """
    classes = np.concatenate(groups)
    whole = set(rng.permutation(classes)[: round(disjoint * len(classes))].tolist())
    parts: list[list[Rows]] = [[] for _ in groups]
    for home, group in enumerate(groups):
        others = [i for i in range(len(groups)) if i != home]
        for c in group.tolist():
            rows = rng.permutation(pools[c])
            away = 0 if c in whole or not others else int(share * len(rows) + 1e-9)  # 0.29 · 100 is 28.999…
            parts[home].append(rows[away:])
            # Drawn order of the others, so that a remainder does not always fall to the first experiences.
            for i, other in enumerate(rng.permutation(others)):
                parts[other].append(rows[:away][i :: len(others)])
    return [np.concatenate(p) for p in parts]


def repeated(
    pools: dict[int, Rows], groups: list[np.ndarray], experiences: int, probability: float, rng: np.random.Generator
) -> list[Rows]:
    """Rows of each experience when classes of earlier experiences return, each with `probability`.

    New classes arrive in the first len(groups) experiences. A later experience for which no class is drawn gets one
    at random. The samples of a class are shared out evenly over the experiences it is in, each sample once.
    """
    appears: dict[int, list[int]] = {}
    for i in range(experiences):
        met = np.array(sorted(appears), dtype=np.int64)
        now = met[rng.random(len(met)) < probability].tolist()
        now += groups[i].tolist() if i < len(groups) else []
        for c in now or [int(rng.choice(met))]:
            appears.setdefault(c, []).append(i)
    parts: list[list[Rows]] = [[] for _ in range(experiences)]
    for c, where in appears.items():
        for i, rows in zip(where, np.array_split(rng.permutation(pools[c]), len(where)), strict=True):
            parts[i].append(rows)
    return [np.concatenate(p) for p in parts]


def hold_out(rows: Rows, labels: np.ndarray, share: float, rng: np.random.Generator) -> tuple[Rows, Rows]:
    """`rows` (n,) sorted, split into kept and held out: `share` of each class, at least one of two samples."""
    held: list[Rows] = []
    for c in np.unique(labels[rows]):
        of_class = rows[labels[rows] == c]
        count = min(max(1, round(share * len(of_class))), len(of_class) - 1)
        held.append(rng.permutation(of_class)[:count])
    out = np.sort(np.concatenate(held))
    return np.setdiff1d(rows, out, assume_unique=True), out


def first_per_class(labels: np.ndarray, domains: np.ndarray | None, count: int | None) -> Rows:
    """Rows of the first `count` samples of each class, and of each domain where there are any; sorted."""
    if count is None:
        return np.arange(len(labels))
    pairs = labels[:, None] if domains is None else np.stack([labels, domains], 1)
    _, keys = np.unique(pairs, axis=0, return_inverse=True)
    order = np.argsort(keys, kind="stable")  # class by class, rows in their order
    starts = np.searchsorted(keys[order], keys[order])
    return np.sort(order[np.arange(len(order)) - starts < count])


def places(ids: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each of `ids` (N,) stands in `among` (C,), distinct, in any order; -1: nowhere. Ids of any size do."""
    order = np.argsort(among)
    found = order[np.searchsorted(among, ids, sorter=order).clip(max=len(among) - 1)]
    return np.where(among[found] == ids, found, -1)
