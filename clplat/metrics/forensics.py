"""Which samples were erased? What an attacker can tell from the unlearned model alone, without the one before it.

The attacker holds candidates, each with its label, and the model that a request has left. It is told of half of the
candidates whether they were erased, learns a rule from the model's outputs on these, and is tested on the other half:
so no direction is presumed (what was unlearned too little has a lower loss than what was never seen, what was unlearned
too much a higher one, and both give it away). Rules that know less of the truth find less, rules that look at weights,
gradients or several queries of a sample may find more.

A retrained model is the measure here too: it tells erased from never seen with 0.5 within the interval, but erased from
retained by as much as any model tells what it has learned from what it has not.

Legend: m erased and n other samples, C classes; φ the logit-scaled confidence (`membership.logit_confidences`).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from clplat.metrics import membership
from clplat.metrics.membership import Array, Scores

LEAST = 10  # candidates of a side: five to learn from and five to be tested on


def auc_interval(auc: float, positives: int, negatives: int, z: float = 1.959964) -> tuple[float, float]:
    """Interval of an AUC A measured on so many samples a side, 95 % with the default z; in [0, 1], holds A.

    The two θ with (A − θ)² = z² V(θ), and 0 or 1 where A is:

        V(θ) = θ(1 − θ) [1 + (N − 1) ((1 − θ) / (2 − θ) + θ / (1 + θ))] / (m n),   N = (m + n) / 2

    Source: Newcombe, "Confidence intervals for an effect size measure based on the Mann-Whitney statistic. Part 2",
    Statistics in Medicine 25, 2006, method 5, after the variance of Hanley and McNeil, 1982. Unlike an interval of
    A ± z σ it has a width at A = 1. Samples must be independent, and the rule not fitted to them.

    >>> [round(v, 3) for v in auc_interval(1.0, 20, 20)]
    [0.899, 1.0]
    """
    return _lower(auc, positives, negatives, z), 1 - _lower(1 - auc, negatives, positives, z)


def _lower(auc: float, positives: int, negatives: int, z: float) -> float:
    from scipy.optimize import brentq

    if auc <= 0:
        return 0.0

    def beyond(theta: float) -> float:
        spread = 1 + ((positives + negatives) / 2 - 1) * ((1 - theta) / (2 - theta) + theta / (1 + theta))
        wide = z * z * theta * spread / (positives * negatives)
        if auc >= 1:  # 1 itself is a root, which is divided out
            return 1 - theta - wide
        return (auc - theta) ** 2 - wide * (1 - theta)

    return float(brentq(beyond, 0.0, auc, xtol=1e-14))  # above 0 at the one end, below at the other


def outputs(logits: ArrayLike, labels: ArrayLike) -> Array:
    """What the attacker's rule reads of each sample, (n, 4): φ, φ², entropy, lead of the first class over the second.

    The entropy is in nats, the lead one of probabilities. φ² lets a rule pick out what lies between two others.

    >>> outputs([[0.0, 0.0]], [1]).round(3).tolist()
    [[0.0, 0.0, 0.693, 0.0]]
    """
    p, phi = membership.softmax(logits), membership.logit_confidences(logits, labels)
    entropy = -np.sum(p * np.log(np.where(p > 0, p, 1.0)), axis=1)
    ranked = np.sort(p, axis=1)
    lead = ranked[:, -1] - ranked[:, -2] if p.shape[1] > 1 else ranked[:, -1]
    return np.stack([phi, phi**2, entropy, lead], axis=1)


def told_apart(erased: ArrayLike, others: ArrayLike, seed: int = 0) -> dict[str, Any] | None:
    """AUC, with its interval, of a rule that is learned on half of the candidates and tested on the other half.

    The rule is a logistic regression on standardised features, both sides of equal weight.

    Args:
        erased: (m, k) features of erased samples, `outputs`.
        others: (n, k) of samples that were not erased.
        seed: of the halves.

    Returns:
        auc, low, high, and `tested`: samples (erased, others) of the half tested on; None where a side has fewer
        than 10.

    >>> told_apart(np.linspace(1, 2, 40)[:, None], np.linspace(3, 4, 60)[:, None])["tested"]
    [20, 30]
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    sides, rng = [np.asarray(v, dtype=np.float64) for v in (erased, others)], np.random.default_rng(seed)
    if min(map(len, sides)) < LEAST:
        return None
    (learn_a, test_a), (learn_b, test_b) = (np.array_split(rng.permutation(v), [len(v) - len(v) // 2]) for v in sides)
    rule = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced", max_iter=1000))
    rule.fit(np.concatenate([learn_a, learn_b]), np.repeat([1, 0], [len(learn_a), len(learn_b)]))
    found = membership.auc(rule.decision_function(test_a), rule.decision_function(test_b))
    low, high = auc_interval(found, len(test_a), len(test_b))
    return {"auc": found, "low": low, "high": high, "tested": [len(test_a), len(test_b)]}


def which_were_erased(scores: Scores) -> dict[str, dict[str, Any] | None]:
    """`told_apart` of the erased samples from those never seen and from those retained, by one model's scores.

    Never seen are those of `membership.unseen`; retained those of the erased samples' classes, or, where none is left,
    all: then the class alone gives the erased ones away, and `of` says so. None: not scored, or too few.

    Returns:
        "forensic_unseen" and "forensic_retained".
    """
    where, never = membership.unseen_rows(scores)
    found: dict[str, dict[str, Any] | None] = {"forensic_unseen": None, "forensic_retained": None}
    if not membership.scored(scores, "erased"):
        return found
    if where is not None:
        found["forensic_unseen"] = _apart(scores, *where, str(never))
    if membership.scored(scores, "retained"):
        same = np.isin(scores["retained.labels"], scores["erased.labels"])
        of = "retained samples of the same classes" if same.any() else "retained samples, all of other classes"
        found["forensic_retained"] = _apart(scores, "retained", same if same.any() else ~same, of)
    return found


def _apart(scores: Scores, name: str, rows: NDArray[np.bool_], of: str) -> dict[str, Any] | None:
    sides = [outputs(scores[f"{s}.logits"], scores[f"{s}.labels"]) for s in ("erased", name)]
    found = told_apart(sides[0], sides[1][rows])
    return found and found | {"of": of}
