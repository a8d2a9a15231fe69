"""Metrics of continual pretraining: pure functions of the perplexities of domains.

Legend: P is (n + 1, E) perplexities ≥ 1, NaN where not measured: E domains, n of them finished; row 0 is before any
training, row i after i domains; column j is the test set of domain j (from 0), which is learned between rows j and
j + 1. `columns` are the domains that are finished. Every function returns NaN where no column qualifies or a perplexity
it needs is NaN.

Source: Yıldız et al., "Investigating Continual Pretraining in Large Language Models", TMLR 2025, arXiv:2402.17400, for
zero-shot, continual and last-checkpoint perplexity; how the others are averaged: this platform. Means are over domains,
as they are; forgetting is of logarithms, so that no domain of high perplexity decides it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clplat.metrics.matrix import Matrix, _mean


def zero_shot_perplexity(perplexities: Matrix, columns: Sequence[int]) -> float:
    """Mean over domains of the perplexity before any training; ≥ 1, lower is better.

        ZS = (1 / |C|) Σ_{j ∈ C} P[0, j]

    >>> zero_shot_perplexity(np.array([[8.0, 6.0], [4.0, 5.0], [5.0, 2.0]]), [0, 1])
    7.0
    """
    return _mean(perplexities[0, j] for j in columns)


def continual_perplexity(perplexities: Matrix, columns: Sequence[int]) -> float:
    """Mean over domains of the perplexity just after learning; ≥ 1, lower is better.

        CPT = (1 / |C|) Σ_{j ∈ C} P[j + 1, j]

    >>> continual_perplexity(np.array([[8.0, 6.0], [4.0, 5.0], [5.0, 2.0]]), [0, 1])
    3.0
    """
    return _mean(perplexities[j + 1, j] for j in columns)


def last_perplexity(perplexities: Matrix, columns: Sequence[int]) -> float:
    """Mean over domains of the perplexity at the end; ≥ 1, lower is better.

        LC = (1 / |C|) Σ_{j ∈ C} P[n, j]

    >>> last_perplexity(np.array([[8.0, 6.0], [4.0, 5.0], [5.0, 2.0]]), [0, 1])
    3.5
    """
    return _mean(perplexities[-1, j] for j in columns)


def perplexity_forgetting(perplexities: Matrix, columns: Sequence[int]) -> float:
    """Mean over past domains of the logarithm of the last perplexity over that just after learning; lower is better.

        FG = (1 / |C|) Σ_{j ∈ C} ln (P[n, j] / P[j + 1, j])   over the domains with one after their own

    >>> round(perplexity_forgetting(np.array([[8.0, 6.0], [4.0, 5.0], [5.0, 2.0]]), [0, 1]), 4)  # ln (5 / 4)
    0.2231
    """
    last = len(perplexities) - 1
    return _mean(np.log(perplexities[last, j] / perplexities[j + 1, j]) for j in columns if j + 1 < last)


def perplexity_backward_transfer(perplexities: Matrix, columns: Sequence[int]) -> float:
    """Mean over past domains of the perplexity just after learning minus the last; higher is better.

        BWT = (1 / |C|) Σ_{j ∈ C} (P[j + 1, j] − P[n, j])   over the domains with one after their own

    >>> perplexity_backward_transfer(np.array([[8.0, 6.0], [4.0, 5.0], [5.0, 2.0]]), [0, 1])
    -1.0
    """
    last = len(perplexities) - 1
    return _mean(perplexities[j + 1, j] - perplexities[last, j] for j in columns if j + 1 < last)


def perplexity_forward_transfer(perplexities: Matrix, columns: Sequence[int]) -> float:
    """What domains met so far take off the perplexity of those to come, against none; higher is better.

        FWT = mean over rows i ≥ 1 of FWT_i,   FWT_i = mean over j ∈ C, j ≥ i, of P[0, j] − P[i, j]

    >>> P = np.array([[8.0, 6.0, 9.0], [4.0, 5.0, 8.0], [5.0, 2.0, 5.0], [5.0, 3.0, 1.0]])
    >>> perplexity_forward_transfer(P, [0, 1, 2])  # ((1 + 1) / 2 + 4) / 2
    2.5
    """
    to_come = [(i, [j for j in columns if j >= i]) for i in range(1, len(perplexities))]
    return _mean(_mean(perplexities[0, j] - perplexities[i, j] for j in own) for i, own in to_come if own)
