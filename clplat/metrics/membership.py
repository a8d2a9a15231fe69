"""Membership inference: can the data that a model was trained on be told from data that it never saw?

Every number here is to be read beside those of the original model and of one retrained without the erased data: the
target is the retrained model's number, not an extreme of the scale. These are population attacks (one attacker for all
samples); attacks made for each sample by shadow models are stronger (Hayes et al., 2024, arXiv:2403.01218).

Legend: n samples, C classes, p (n, C) probabilities, y (n,) class ids. Functions change none of their arguments.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

MOST_NATS = 87.0  # −ln of the least normal float32: the loss of a class that gets no probability at all
Array = NDArray[np.float64]


def softmax(logits: ArrayLike) -> Array:
    """Probabilities (n, C) in [0, 1] of logits (n, C), −inf allowed; a row of −inf alone has no probability: zeros.

    >>> softmax([[0.0, 0.0, -np.inf]]).tolist()
    [[0.5, 0.5, 0.0]]
    """
    z = np.asarray(logits, dtype=np.float64)
    top = z.max(axis=1, keepdims=True)
    powers = np.exp(z - np.where(np.isfinite(top), top, 0.0))
    total = powers.sum(axis=1, keepdims=True)
    return powers / np.where(total > 0, total, 1.0)


def cross_entropies(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Cross-entropy (n,) of each sample in nats, in [0, 87]: of classes without any probability 87, and not infinite.

        L = ln Σ_j exp z_j − z_y

    >>> cross_entropies([[0.0, 0.0], [0.0, -np.inf]], [0, 1]).round(3).tolist()
    [0.693, 87.0]
    """
    z, y = np.asarray(logits, dtype=np.float64), np.asarray(labels)
    top = z.max(axis=1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        loss = np.log(np.exp(z - top).sum(axis=1)) + top[:, 0] - z[np.arange(len(y)), y]
    return np.clip(np.where(np.isnan(loss), MOST_NATS, loss), 0.0, MOST_NATS)


def true_confidences(p: ArrayLike, labels: ArrayLike) -> Array:
    """Probability p_y (n,) of each sample's own class, in [0, 1].

    >>> true_confidences([[0.2, 0.8], [0.5, 0.5]], [1, 0]).tolist()
    [0.8, 0.5]
    """
    y = np.asarray(labels)
    return np.asarray(p, dtype=np.float64)[np.arange(len(y)), y]


def logit_confidences(logits: ArrayLike, labels: ArrayLike) -> Array:
    """Logit-scaled confidence φ (n,) of each sample's own class, in [−87, 87]; 0 where p_y is ½.

        φ = ln(p_y / (1 − p_y)) = z_y − ln Σ_{j ≠ y} exp z_j

    Source: Carlini et al., "Membership inference attacks from first principles" (LiRA), S&P 2022, arXiv:2112.03570:
    over models it is nearly Gaussian, as the loss is not.

    >>> logit_confidences([[2.0, 0.0], [0.0, -np.inf], [0.0, -np.inf]], [0, 0, 1]).tolist()
    [2.0, 87.0, -87.0]
    """
    z, y = np.array(logits, dtype=np.float64), np.asarray(labels)
    at = np.arange(len(y)), y
    own = z[at]
    z[at] = -np.inf
    top = z.max(axis=1, keepdims=True)
    top = np.where(np.isfinite(top), top, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        others = np.log(np.exp(z - top).sum(axis=1)) + top[:, 0]
        phi = own - others
    return np.clip(np.where(np.isneginf(own), -MOST_NATS, phi), -MOST_NATS, MOST_NATS)


def modified_entropies(p: ArrayLike, labels: ArrayLike) -> Array:
    """Modified entropy (n,) of each sample, ≥ 0; 0 for a sure and right prediction, large for a sure and wrong one.

        Mentr(p, y) = −(1 − p_y) ln p_y − Σ_{j ≠ y} p_j ln(1 − p_j)

    Source: Song and Mittal, "Systematic evaluation of privacy risks of machine learning models", USENIX Security 2021,
    arXiv:2003.10595, equation 8. Public unlearning code has ln p_j for ln(1 − p_j), and takes the columns of all
    labels for each row, so that a sample's value depends on the batch it comes in.

    >>> modified_entropies([[1.0, 0.0], [0.5, 0.5]], [0, 0]).round(4).tolist()
    [0.0, 0.6931]
    """
    p, y = np.array(p, dtype=np.float64), np.asarray(labels)
    least = math.exp(-MOST_NATS)
    own = p[np.arange(len(y)), y]
    others = -p * np.log(np.clip(1 - p, least, 1.0))  # (n, C)
    others[np.arange(len(y)), y] = 0.0
    return -(1 - own) * np.log(np.clip(own, least, 1.0)) + others.sum(axis=1)


Scores = Mapping[str, NDArray[Any]]  # "<set>.logits" (n, C) and "<set>.labels" (n,) of the sets of an audit


def scored(scores: Scores, name: str) -> bool:
    """Whether class scores of a set are there."""
    return f"{name}.logits" in scores and scores[f"{name}.logits"].shape[1] > 0


def losses_of(scores: Scores, name: str, rows: NDArray[np.bool_] | None = None) -> Array:
    """Cross-entropies (n,) of a set, or of its `rows` (n,) bool; empty where it was not scored."""
    if not scored(scores, name):
        return np.zeros(0)
    found = cross_entropies(scores[f"{name}.logits"], scores[f"{name}.labels"])
    return found if rows is None else found[rows]


def unseen(scores: Scores) -> tuple[Array, str | None]:
    """Losses (n,) that those of the erased samples are told from, and what they are of; (empty, None): nothing.

    Held-out samples that go with the erased ones; where none do (a request for single samples), those of the same
    classes; where none of these are left, all. A class that is hard or easy as such then tells nothing.
    """
    where, note = unseen_rows(scores)
    return (np.zeros(0), None) if where is None else (losses_of(scores, *where), note)


def unseen_rows(scores: Scores) -> tuple[tuple[str, NDArray[np.bool_]] | None, str | None]:
    """The samples of `unseen`: a set and its rows (n,) bool, and what they are."""
    if scored(scores, "erased_test"):
        return (
            "erased_test",
            np.ones(len(scores["erased_test.labels"]), np.bool_),
        ), "held-out samples that go with them"
    if not (scored(scores, "retained_test") and scored(scores, "erased")):
        return None, None
    same = np.isin(scores["retained_test.labels"], scores["erased.labels"])
    if not same.any():
        return ("retained_test", ~same), "held-out samples of other classes"
    return ("retained_test", same), "held-out samples of the same classes"


def erased_loss_auc(scores: Scores) -> float:
    """`loss_auc` of the erased samples against `unseen`; NaN where one of them is empty. The log's and the report's."""
    return loss_auc(losses_of(scores, "erased"), unseen(scores)[0])


def auc(positives: ArrayLike, negatives: ArrayLike) -> float:
    """Chance that a positive's score exceeds a negative's, ties counted half; in [0, 1], NaN where either is empty.

    Area under the ROC curve, by the rank sum of Mann and Whitney (1947). auc(a, b) + auc(b, a) = 1.

    >>> auc([0.9, 0.8], [0.1, 0.8])
    0.875
    """
    from scipy.stats import rankdata

    a, b = np.asarray(positives, dtype=np.float64), np.asarray(negatives, dtype=np.float64)
    if not len(a) or not len(b):
        return float("nan")
    ranks = rankdata(np.concatenate([a, b]))
    return float((ranks[: len(a)].sum() - len(a) * (len(a) + 1) / 2) / (len(a) * len(b)))


def loss_auc(members: ArrayLike, others: ArrayLike) -> float:
    """AUC of the threshold attack on the loss: chance that a member's loss is below a non-member's; in [0, 1].

    0.5 where losses tell nothing. Members are the positives and a low loss speaks for membership; public code with
    the roles swapped gives 1 − AUC.

    Source: the attack of Yeom et al., "Privacy risk in machine learning", CSF 2018, arXiv:1709.01604, at all
    thresholds.

    Args:
        members: (m,) losses of training (or erased) samples.
        others: (n,) losses of samples never trained on, of the same classes.

    >>> loss_auc([0.1, 0.2], [1.0, 2.0, 0.15])
    0.8333333333333334
    """
    return auc(-np.asarray(members, dtype=np.float64), -np.asarray(others, dtype=np.float64))


def loss_attack_accuracy(erased: ArrayLike, unseen: ArrayLike, seed: int = 0, splits: int = 5) -> float:
    """Accuracy of a logistic regression on the loss that tells erased from unseen samples; ideal 0.5.

    Balanced by drawing from the larger side, in stratified shuffled splits (a fifth held out), averaged. NaN with
    fewer than 5 samples a side. Values below 0.5 are noise.

    Source: the attack of Kurmanji et al., "Towards unbounded machine unlearning" (SCRUB), NeurIPS 2023,
    arXiv:2302.09880, whose code filters the test set in place; here nothing is changed.

    Args:
        erased: (m,) losses of the erased training samples.
        unseen: (n,) losses of test samples of the same classes.
        seed: of the draw and the splits.

    >>> loss_attack_accuracy(np.linspace(0, 1, 20), np.linspace(2, 3, 30))
    1.0
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    a, b = balanced(np.asarray(erased, dtype=np.float64), np.asarray(unseen, dtype=np.float64), seed)
    if len(a) < 5:
        return float("nan")
    losses, member = np.concatenate([a, b])[:, None], np.repeat([1, 0], len(a))
    folds = StratifiedShuffleSplit(n_splits=splits, test_size=0.2, random_state=seed)
    return float(cross_val_score(LogisticRegression(), losses, member, cv=folds, scoring="accuracy").mean())


def svc_membership(members: ArrayLike, others: ArrayLike, targets: ArrayLike, seed: int = 0) -> float:
    """Share of `targets` that a support vector machine takes for members; in [0, 1], NaN where one of them is empty.

    The attacker learns on retained training samples (members) against test samples (others), one feature a sample:
    confidence p_y (the one usually reported), entropy or modified entropy. Its "forget efficacy" is 1 − this.

    Source: Fan et al., "SalUn", ICLR 2024, arXiv:2310.12508, after Song and Mittal: SVC(rbf, C = 3, gamma = auto).
    Differs: both sides are drawn at random to equal size; the authors' code takes the first |others| members as they
    come, so that data sorted by class bias it, and fails with fewer members than others.

    Args:
        members: (m,) or (m, k) features of retained training samples.
        others: (n,) or (n, k) of test samples.
        targets: (t,) or (t, k) of the erased samples.
        seed: of the draw.

    >>> svc_membership(np.linspace(0.9, 1, 20), np.linspace(0, 0.5, 20), [0.95, 0.97, 0.2])
    0.6666666666666666
    """
    from sklearn.svm import SVC

    m, o, t = (np.asarray(v, dtype=np.float64) for v in (members, others, targets))
    if not len(m) or not len(o) or not len(t):
        return float("nan")
    m, o, t = (v.reshape(len(v), -1) for v in (m, o, t))
    m, o = balanced(m, o, seed)
    attacker = SVC(C=3, gamma="auto", kernel="rbf").fit(np.concatenate([m, o]), np.repeat([1, 0], len(m)))
    return float(attacker.predict(t).mean())


def balanced(a: Array, b: Array, seed: int) -> tuple[Array, Array]:
    """As many rows of each, drawn at random without replacement from the larger one.

    >>> [len(v) for v in balanced(np.zeros(7), np.ones(3), 0)]
    [3, 3]
    """
    size, rng = min(len(a), len(b)), np.random.default_rng(seed)
    return rng.permutation(a)[:size], rng.permutation(b)[:size]


def empirical_epsilon(fpr: ArrayLike, fnr: ArrayLike, delta: float = 1e-3) -> float:
    """Lower bound on ε of (ε, δ)-unlearning from an attacker's error rates; ≥ 0, the largest over thresholds.

        ε ≥ max(0, ln((1 − δ − FPR) / FNR), ln((1 − δ − FNR) / FPR))

    The rates must come from many independent pairs of unlearned and retrained models; from few it is noise. An error
    rate of 0 measured on n pairs bounds nothing: pass at least 1 / n.

    Source: Kairouz, Oh and Viswanath, "The composition theorem for differential privacy", ICML 2015, arXiv:1311.0776;
    for unlearning: Hayes et al., 2024, arXiv:2403.01218.

    >>> round(empirical_epsilon([0.5, 0.1], [0.5, 0.2], delta=0.0), 4)  # ln(0.8 / 0.1)
    2.0794
    """
    a, b = np.asarray(fpr, dtype=np.float64), np.asarray(fnr, dtype=np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        bounds = [np.log((1 - delta - x) / y) for x, y in ((a, b), (b, a))]
    return max(0.0, float(np.nanmax(np.where(np.isnan(bounds), -np.inf, bounds))))
