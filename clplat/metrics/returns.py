"""Metrics of a sequence of environments: what is kept of the earlier ones, and what helps with the later.

Legend: n environments, T of each, S (n, n) normalised returns: row i after acting in environment i, column j those of
environment j. As in Continual World, with normalised returns for its success rates.

Source: Wołczyk et al., "Continual World", NeurIPS 2021, arXiv:2105.10919.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clplat.metrics.adaptation import ReturnCurve
from clplat.metrics.matrix import Matrix


def final_return(scores: Matrix) -> float:
    """Normalised return in all environments at the end, averaged; higher is better, not clipped.

        P = (1 / n) Σ_j S[n, j]

    >>> final_return(np.array([[0.5, 0.0], [0.25, 0.75]]))
    0.5
    """
    return float(scores[-1].mean())


def return_forgetting(scores: Matrix) -> float:
    """Normalised return lost between the end of an environment and the end of all, averaged; lower is better.

        F = (1 / n) Σ_j (S[j, j] − S[n, j])

    The last environment counts with 0, as published: of n environments n − 1 can be forgotten. Below 0 where later
    environments improve earlier ones.

    >>> return_forgetting(np.array([[0.5, 0.0], [0.25, 0.75]]))
    0.125
    """
    return float((scores.diagonal() - scores[-1]).mean())


def area(curve: ReturnCurve) -> float:
    """Mean normalised return while acting, from entry to the last evaluation, by the trapezoidal rule.

        A = (1 / T) ∫_0^T S_t dt     NaN where the return on entry was not measured

    >>> area(ReturnCurve(0, 100, 0, [10, 20], [50, 100]))
    0.5
    """
    if curve.before is None or not curve.steps[-1]:
        return float("nan")
    times = [0, *curve.steps]
    values = [curve.normalized(g) for g in (curve.before, *curve.returns)]
    return float(np.trapezoid(values, times) / times[-1])


def return_forward_transfer(curves: Sequence[ReturnCurve], references: Sequence[ReturnCurve]) -> float:
    """Area gained over learning each environment alone, as a share of what there was to gain; averaged, at most 1.

        FT = (1 / n) Σ_j (A_j − A*_j) / (1 − A*_j)     A* areas of the reference, which must be below 1

    Below 0 where what came before hinders.

    Args:
        curves: of each environment in the sequence.
        references: of an agent that begins anew in each environment, at the same number of steps.

    >>> return_forward_transfer([ReturnCurve(0, 100, 0, [10, 20], [50, 100])], [ReturnCurve(0, 100, 0, [20], [0])])
    0.5
    """
    pairs = zip(map(area, curves), map(area, references), strict=True)
    return float(np.mean([(own - alone) / (1 - alone) for own, alone in pairs]))
