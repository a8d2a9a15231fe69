"""Scores of several runs on several tasks, as deep reinforcement learning should report them.

Source: Agarwal et al., "Deep reinforcement learning at the edge of the statistical precipice", NeurIPS 2021,
arXiv:2108.13264; the definitions are theirs. Legend: scores (R, T) of R runs (seeds) on T tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike


def interquartile_mean(scores: ArrayLike) -> float:
    """Mean of the middle half of all R · T scores, a quarter of them (rounded down) cut off at each end.

    >>> interquartile_mean([[0.0], [1.0], [2.0], [99.0]])
    1.5
    """
    values = np.sort(np.asarray(scores, dtype=np.float64), axis=None)
    cut = len(values) // 4
    return float(values[cut : len(values) - cut].mean())


def probability_of_improvement(x: ArrayLike, y: ArrayLike) -> float:
    """Probability that a run of x is better than one of y on a task drawn at random; ties count half; in [0, 1].

        P(X > Y) = (1 / T) Σ_t (1 / (R_x R_y)) Σ_i Σ_j [x_it > y_jt] + ½ [x_it = y_jt]

    Args:
        x, y: (R_x, T) and (R_y, T).

    >>> probability_of_improvement([[1.0], [3.0]], [[2.0], [1.0]])
    0.625
    """
    a, b = np.asarray(x, dtype=np.float64)[:, None], np.asarray(y, dtype=np.float64)[None]
    return float(((a > b) + 0.5 * (a == b)).mean(axis=(0, 1)).mean())


def performance_profile(scores: ArrayLike, thresholds: ArrayLike) -> np.ndarray:
    """Share of all R · T scores above each threshold τ, (len(thresholds),); falls from 1 to 0.

    >>> performance_profile([[0.2], [0.8]], [0.0, 0.5, 1.0]).tolist()
    [1.0, 0.5, 0.0]
    """
    values = np.asarray(scores, dtype=np.float64).reshape(1, -1)
    return (values > np.asarray(thresholds, dtype=np.float64).reshape(-1, 1)).mean(axis=1)


def stratified_bootstrap(
    statistic: Callable[..., float], *scores: ArrayLike, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of a statistic: runs are drawn anew, with replacement, for each task by itself.

    Args:
        statistic: of as many score matrices as are given.
        scores: (R, T) each; drawn independently.
        confidence: in (0, 1).
        draws: ≥ 1.

    >>> stratified_bootstrap(interquartile_mean, [[1.0], [1.0], [1.0]])
    (1.0, 1.0)
    """
    low, high = _percentiles(statistic, scores, confidence, draws, seed)
    return float(low), float(high)


def profile_interval(
    scores: ArrayLike, thresholds: ArrayLike, confidence: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Percentile interval of a performance profile at each threshold by itself, drawn as in `stratified_bootstrap`.

    >>> [end.tolist() for end in profile_interval([[1.0], [1.0]], [0.0, 2.0])]
    [[1.0, 0.0], [1.0, 0.0]]
    """
    low, high = _percentiles(lambda s: performance_profile(s, thresholds), (scores,), confidence, draws, seed)
    return low, high


def _percentiles(
    statistic: Callable[..., Any], scores: Sequence[ArrayLike], confidence: float, draws: int, seed: int
) -> np.ndarray:
    """(2, ...) ends of the interval of a statistic (...)."""
    generator = np.random.default_rng(seed)
    matrices = [np.asarray(s, dtype=np.float64) for s in scores]
    found = []
    for _ in range(draws):
        drawn = [np.take_along_axis(m, generator.integers(len(m), size=m.shape), axis=0) for m in matrices]
        found.append(statistic(*drawn))
    return np.quantile(found, [(1 - confidence) / 2, (1 + confidence) / 2], axis=0)
