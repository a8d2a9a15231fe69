"""What is left in a model that no longer shows it: relearning, linear probes, and planted behaviour.

A model may stop naming a class and still know it: it is then learned again faster than by a model that never saw it,
and its features still separate it.

Legend: n samples, D features, C classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike


@dataclass(frozen=True)
class RelearnTime:
    """Steps until the target was reached.

    Args:
        steps: ≥ 0.
        censored: the target was not reached: the true number is larger than `steps`.
    """

    steps: int
    censored: bool = False


@dataclass(frozen=True)
class Index:
    """A ratio of relearn times; `bound` is exact, "at least" or "at most" where a time was censored."""

    value: float
    bound: str = "exact"


def relearn_time(accuracies: Sequence[float], target: float, cap: int) -> RelearnTime:
    """Gradient steps on the erased data until the accuracy on them is at least `target`.

        RT = min {t : a_t ≥ target}

    Source: Golatkar et al., "Eternal sunshine of the spotless net", CVPR 2020, arXiv:1911.04933 (by loss); the target
    (1 − α) acc(θ_o, D_f) as in Chundawat et al., "Zero-shot machine unlearning", TIFS 2023, arXiv:2201.05629.

    Args:
        accuracies: a_0 ... a_k in [0, 1] after t = 0 ... k steps; may end early once it is 1.
        target: in [0, 1].
        cap: most steps; beyond them the time is censored, not infinite.

    >>> relearn_time([0.0, 0.4, 0.9], target=0.8, cap=10)
    RelearnTime(steps=2, censored=False)
    >>> relearn_time([0.0, 0.4, 0.5], target=0.8, cap=2)
    RelearnTime(steps=2, censored=True)
    """
    for step, accuracy in enumerate(accuracies[: cap + 1]):
        if accuracy >= target - 1e-12:
            return RelearnTime(step)
    return RelearnTime(min(cap, max(len(accuracies) - 1, 0)), censored=True)


def anamnesis_index(unlearned: RelearnTime, oracle: RelearnTime) -> Index | None:
    """AIN: relearn time of the unlearned model over that of the retrained one; 1 is ideal.

        AIN = RT(θ_u) / RT(θ_r)

    Well below 1: knowledge is left. Well above: more was taken than the data brought. 1 where neither needs a step.
    None where it can't be told: only the retrained model needs no step, or neither reached the target.

    Source: Chundawat et al., TIFS 2023, arXiv:2201.05629; both times are for one target and one optimiser. One public
    implementation measures the unlearned model twice, so that it is always 1.

    >>> anamnesis_index(RelearnTime(3), RelearnTime(12))
    Index(value=0.25, bound='exact')
    >>> anamnesis_index(RelearnTime(3), RelearnTime(50, censored=True))
    Index(value=0.06, bound='at most')
    """
    if unlearned.censored and oracle.censored:
        return None
    if unlearned.steps == oracle.steps == 0 and not unlearned.censored and not oracle.censored:
        return Index(1.0)
    if oracle.steps == 0:
        return None
    bound = "at most" if oracle.censored else "at least" if unlearned.censored else "exact"
    return Index(unlearned.steps / oracle.steps, bound)


def probe_accuracy(
    features: ArrayLike, labels: ArrayLike, test_features: ArrayLike, test_labels: ArrayLike, ridge: float = 1e-2
) -> float:
    """Accuracy of a linear classifier fitted anew on frozen features; in [0, 1], NaN without test samples.

    Whether what a head no longer says is still in the features: fitted on erased and retained training samples, tested
    on test samples of the erased classes. Ridge regression on one-hot labels, features standardised.

    Source: linear probes as in Alain and Bengio, 2016, arXiv:1610.01644; the closed form is this platform's choice.

    Args:
        features: (n, D) of the samples to fit on.
        labels: (n,).
        test_features: (t, D).
        test_labels: (t,).
        ridge: > 0, in units of n on standardised features.

    >>> probe_accuracy([[0.0], [0.1], [1.0], [1.1]], [3, 3, 7, 7], [[0.05], [0.9]], [3, 7])
    1.0
    """
    x, y = np.asarray(features, dtype=np.float64), np.asarray(labels)
    t, u = np.asarray(test_features, dtype=np.float64), np.asarray(test_labels)
    if not len(x) or not len(t):
        return float("nan")
    mean, scale = x.mean(axis=0), x.std(axis=0)
    scale = np.where(scale > 0, scale, 1.0)
    z, t = (x - mean) / scale, (t - mean) / scale
    classes, columns = np.unique(y, return_inverse=True)
    onehot = np.eye(len(classes))[columns]
    level = onehot.mean(axis=0)
    n, width = z.shape
    if width <= n:
        scores = t @ np.linalg.solve(z.T @ z + ridge * n * np.eye(width), z.T @ (onehot - level))
    else:  # the same solution from the n × n side
        scores = t @ (z.T @ np.linalg.solve(z @ z.T + ridge * n * np.eye(n), onehot - level))
    return float((classes[(scores + level).argmax(axis=1)] == u).mean())


def attack_success_rate(predictions: ArrayLike, labels: ArrayLike, target: int) -> float:
    """ASR: share of triggered samples of other classes that are given the attacker's class; in [0, 1].

    Of a model blind to the trigger it is the false-positive rate of that class. Report it for the original model (it
    must be high), the unlearned and the retrained one. NaN where all samples are of the target class.

    Source: Gu et al., "BadNets", 2017, arXiv:1708.06733; for unlearning as in the code of Zhao et al., NeurIPS 2024.

    Args:
        predictions: (n,) predicted classes of inputs that carry the trigger.
        labels: (n,) true classes; samples of `target` are left out.
        target: the attacker's class.

    >>> attack_success_rate([7, 7, 2, 7], [1, 2, 2, 7], target=7)
    0.6666666666666666
    """
    p, y = np.asarray(predictions), np.asarray(labels)
    others = y != target
    return float((p[others] == target).mean()) if others.any() else float("nan")


def interclass_confusion(predictions: ArrayLike, labels: ArrayLike, a: int, b: int) -> tuple[float, int]:
    """(IC-ERR in [0, 1], FGT-ERR ≥ 0) for two classes whose labels were swapped in the data to erase.

    IC-ERR: share of test samples of a and b that are not predicted right. FGT-ERR: a taken for b and b for a, counted.

    Source: Goel et al., "Towards adversarial evaluation for inexact machine unlearning", 2022, arXiv:2201.06640, as in
    the code of SCRUB.

    >>> interclass_confusion([0, 1, 1, 2], [0, 0, 1, 1], 0, 1)
    (0.5, 1)
    """
    p, y = np.asarray(predictions), np.asarray(labels)
    rows = (y == a) | (y == b)
    wrong = float((p[rows] != y[rows]).mean()) if rows.any() else float("nan")
    return wrong, int(((y == a) & (p == b)).sum() + ((y == b) & (p == a)).sum())
