"""Metrics of accuracy while learning, from evaluations every so many steps inside experiences.

Legend: an `Evaluation` is one of those: the optimisation step, the experience under way, and E scores in [0, 1] (NaN
where not measured). R is the accuracy matrix (n + 1, E) of `clplat.metrics.matrix`, whose rows are the evaluations at
the ends of experiences. `columns` are the test sets of learn experiences begun, of which nothing is erased.

Where these evaluations take a sample of each test set, minima over them are biased low by the noise of that sample.
Every function returns NaN where no column or evaluation qualifies, or a score it needs is NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clplat.metrics.matrix import Matrix, _mean


@dataclass(frozen=True, eq=False)
class Evaluation:
    """One evaluation inside an experience.

    Args:
        step: optimisation steps done in the run.
        experience: index of the experience under way.
        scores: (E,) accuracy per test set.
    """

    step: int
    experience: int
    scores: NDArray[np.floating]


def average_anytime_accuracy(evaluations: Sequence[Evaluation], columns: Sequence[int]) -> float:
    """Mean over evaluations of the mean accuracy on the test sets met by then; in [0, 1], higher is better.

        AAA = (1 / |V|) Σ_{v ∈ V} (1 / |C_v|) Σ_{j ∈ C_v} a_v[j],   C_v the columns up to the experience under way

    Source: Caccia et al., ICLR 2022, arXiv:2104.05025, averaged anytime accuracy.

    >>> steps = [Evaluation(1, 0, np.array([0.5, 0.1])), Evaluation(2, 1, np.array([0.3, 0.5]))]
    >>> average_anytime_accuracy(steps, [0, 1])  # (0.5 + 0.4) / 2
    0.45
    """
    met = [(v, [j for j in columns if j <= v.experience]) for v in evaluations]
    return _mean(_mean(v.scores[j] for j in on) for v, on in met if on)


def minimum_accuracy(matrix: Matrix, evaluations: Sequence[Evaluation], columns: Sequence[int]) -> float:
    """Mean over past test sets of the lowest accuracy since their experience ended; in [0, 1], higher is better.

        min-ACC = (1 / |C|) Σ_{j ∈ C} min_{t} a_t[j]

    t over evaluations inside the experiences after j and at their ends, C the columns with any.

    Source: De Lange, van de Ven and Tuytelaars, ICLR 2023, arXiv:2205.13452, min-ACC.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]])
    >>> minimum_accuracy(R, [Evaluation(5, 1, np.array([0.3, 0.5]))], [0, 1])
    0.3
    """
    lows = _lows(matrix, evaluations, columns)
    return _mean(lows.values())


def worst_case_accuracy(matrix: Matrix, evaluations: Sequence[Evaluation], columns: Sequence[int]) -> float:
    """Trade-off of the newest test set's final accuracy and the past ones' minima; in [0, 1], higher is better.

        WC-ACC = (1 / k) a_n[k] + (1 − 1 / k) min-ACC,   k the number of columns, the k-th the newest

    A column with no evaluation after its own experience counts with its final accuracy, every other with its minimum.
    It is a lower bound of the average accuracy at every evaluation since the newest experience began.

    Source: De Lange, van de Ven and Tuytelaars, ICLR 2023, arXiv:2205.13452, WC-ACC.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]])
    >>> round(worst_case_accuracy(R, [Evaluation(5, 1, np.array([0.3, 0.5]))], [0, 1]), 3)  # (0.8 + 0.3) / 2
    0.55
    """
    lows = _lows(matrix, evaluations, columns)
    return _mean(lows[j] if j in lows else matrix[-1, j] for j in columns)


def stability_gap(matrix: Matrix, evaluations: Sequence[Evaluation], columns: Sequence[int]) -> float:
    """Depth of the passing drop in past accuracy within an experience, averaged; in [0, 1], lower is better.

        SG = mean over (j, k) of max(0, min(R[k, j], R[k + 1, j]) − min_{v in k} a_v[j])

    over columns j and later experiences k with evaluations inside. What is lost for good (the drop from R[k, j] to
    R[k + 1, j]) is forgetting and not counted: the gap is what comes back by the end of the experience.

    Source: the phenomenon is that of De Lange, van de Ven and Tuytelaars, ICLR 2023, arXiv:2205.13452, who plot it;
    the number is this platform's.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.2], [0.7, 0.8]])
    >>> round(stability_gap(R, [Evaluation(5, 1, np.array([0.3, 0.5]))], [0, 1]), 3)  # min(0.9, 0.7) − 0.3
    0.4
    """
    gaps = []
    for k in sorted({v.experience for v in evaluations if v.experience + 1 < len(matrix)}):
        inside = np.stack([v.scores for v in evaluations if v.experience == k])
        for j in (j for j in columns if j < k):
            gap = np.minimum(matrix[k, j], matrix[k + 1, j]) - np.min(inside[:, j])
            gaps.append(np.maximum(gap, 0.0))
    return _mean(gaps)


def _lows(matrix: Matrix, evaluations: Sequence[Evaluation], columns: Sequence[int]) -> dict[int, float]:
    """Lowest accuracy after the own experience, for each column with any evaluation there."""
    lows = {}
    for j in columns:
        later = [v.scores[j] for v in evaluations if v.experience > j] + list(matrix[j + 2 :, j])
        if later:
            lows[j] = float(np.min(later))
    return lows
