"""U-LiRA: membership inference made for each sample, with shadow models that were unlearned as the model was.

The attacker trains shadow models on the same data, each with another half of the candidates in it, and has each of them
forget the candidates that it had. So each candidate has a distribution of confidences over models that had and forgot
it, and one over models that never had it; the likelihood ratio of the attacked model's confidence under the two says
which of them it is. Where unlearning is exact they are one distribution, and nothing can be told.

Source: Hayes et al., "Inexact unlearning needs more careful evaluations to avoid a false sense of privacy", 2024,
arXiv:2403.01218, and Kurmanji et al., "Towards unbounded machine unlearning", NeurIPS 2023, arXiv:2302.09880, after
Carlini et al., "Membership inference attacks from first principles", S&P 2022, arXiv:2112.03570.
Differs: the variance is one over all candidates (Carlini et al. advise it below 64 shadow models), and one model is
attacked, so that the interval is over candidates and not over models.

Legend: n candidates, S shadow models; φ logit-scaled confidences (`membership.logit_confidences`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clplat.metrics.forensics import auc_interval
from clplat.metrics.membership import Array, auc

_LEAST_VARIANCE = 1e-12  # of confidences that are all equal, as those of masked classes are


def halves(candidates: int, shadows: int, seed: int) -> NDArray[np.bool_]:
    """Which candidates each shadow model has, (S, n) bool: each model half of them, each candidate half of the models.

    Models come in pairs, the second with those that the first has not.

    >>> halves(4, 2, 0).sum(axis=0).tolist()
    [1, 1, 1, 1]
    """
    rng, pairs = np.random.default_rng(seed), list[NDArray[np.bool_]]()
    for _ in range(shadows // 2):
        one = rng.permutation(candidates) < candidates / 2
        pairs += [one, ~one]
    return np.stack(pairs)


def log_likelihood_ratios(target: ArrayLike, shadows: ArrayLike, had: ArrayLike) -> Array:
    """ln of the density of each candidate's φ among models that had it over that among those that never did, (n,).

        Λ = ln N(φ; μ_had, σ²_had) − ln N(φ; μ_not, σ²_not)

    μ is a candidate's own; σ² is the mean over candidates of the unbiased variance around them.

    Args:
        target: (n,) φ of the model attacked.
        shadows: (S, n) those of the shadow models.
        had: (S, n) bool, whether a model had a candidate and forgot it; of each both at least twice.

    >>> log_likelihood_ratios([1.0], [[0.0], [2.0], [5.0], [7.0]], [[True], [True], [False], [False]]).tolist()
    [6.25]
    """
    phi, values, inside = np.asarray(target, np.float64), np.asarray(shadows, np.float64), np.asarray(had, np.bool_)

    def log_density(chosen: NDArray[np.bool_]) -> Array:
        count = chosen.sum(axis=0)  # (n,)
        mean = np.where(chosen, values, 0.0).sum(axis=0) / count
        apart = np.where(chosen, values - mean, 0.0) ** 2
        variance = max(float((apart.sum(axis=0) / (count - 1)).mean()), _LEAST_VARIANCE)
        return -0.5 * (np.log(variance) + (phi - mean) ** 2 / variance)

    return log_density(inside) - log_density(~inside)


def u_lira(target: ArrayLike, shadows: ArrayLike, had: ArrayLike, erased: ArrayLike) -> dict[str, Any]:
    """AUC of the likelihood ratio that erased candidates are told by from those never seen, with its interval.

    Args:
        target, shadows, had: see `log_likelihood_ratios`.
        erased: (n,) bool, whether the model attacked had a candidate and forgot it; else it never had it.

    Returns:
        auc, low, high (95 %, `forensics.auc_interval`), accuracy: share of candidates whose Λ has the right sign.
    """
    truth, ratios = np.asarray(erased, np.bool_), log_likelihood_ratios(target, shadows, had)
    found = auc(ratios[truth], ratios[~truth])
    low, high = auc_interval(found, int(truth.sum()), int((~truth).sum()))
    return {"auc": found, "low": low, "high": high, "accuracy": float(((ratios > 0) == truth).mean())}
