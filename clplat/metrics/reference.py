"""How far an unlearned model is from one retrained without the erased data (the oracle): 0 apart is the aim.

Legend: n samples, C classes; p, q (n, C) probabilities of the unlearned and of the retrained model on the same
samples. A model compared with itself has agreement 1, distance and gap 0, tug-of-war 1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike


def agreement(p: ArrayLike, q: ArrayLike) -> float:
    """Share of samples on which both predict the same class; in [0, 1].

    >>> agreement([[0.9, 0.1], [0.4, 0.6]], [[0.6, 0.4], [0.7, 0.3]])
    0.5
    """
    return float((np.argmax(p, axis=1) == np.argmax(q, axis=1)).mean())


def js_divergence(p: ArrayLike, q: ArrayLike) -> float:
    """Jensen-Shannon divergence in nats, mean over samples; in [0, ln 2], symmetric.

        JS(p, q) = ½ KL(p ‖ m) + ½ KL(q ‖ m),   m = (p + q) / 2

    Source: Lin, "Divergence measures based on the Shannon entropy", 1991. The mean is over samples only: public code
    that means over samples and classes gives values 1 / C as large.

    >>> round(js_divergence([[1.0, 0.0]], [[0.0, 1.0]]), 4)  # ln 2
    0.6931
    """
    from scipy.special import rel_entr

    a, b = np.asarray(p, dtype=np.float64), np.asarray(q, dtype=np.float64)
    middle = (a + b) / 2
    return max(0.0, float(((rel_entr(a, middle) + rel_entr(b, middle)).sum(axis=1) / 2).mean()))


def activation_distance(p: ArrayLike, q: ArrayLike, order: int = 2) -> float:
    """Mean distance of the predicted probabilities; in [0, √2] for order 2 and [0, 2] for order 1.

        mean_x ‖p(x) − q(x)‖

    Source: order 2: Chundawat et al., "Can bad teaching induce forgetting?", AAAI 2023, arXiv:2205.08096; order 1 as
    in the code of SCRUB.

    >>> round(activation_distance([[1.0, 0.0]], [[0.0, 1.0]]), 4)
    1.4142
    """
    difference = np.asarray(p, dtype=np.float64) - np.asarray(q, dtype=np.float64)
    return float(np.linalg.norm(difference, ord=order, axis=1).mean())


def zero_retrain_forgetting(p: ArrayLike, random: ArrayLike) -> float:
    """ZRF on the erased data: near 1 where the model predicts as one that knows nothing; in [1 − ln 2, 1].

        ZRF = 1 − mean_x JS(p(x), p_random(x))

    Source: Chundawat et al., AAAI 2023, arXiv:2205.08096; needs no retrained model. Compare values, don't aim for 1.

    Args:
        p: (n, C) of the unlearned model.
        random: (n, C) of a randomly initialised one.

    >>> zero_retrain_forgetting([[0.5, 0.5]], [[0.5, 0.5]])
    1.0
    """
    return 1 - js_divergence(p, random)


def tug_of_war(unlearned: Sequence[float], oracle: Sequence[float]) -> float:
    """ToW: closeness to the oracle in accuracy on erased, retained and test data at once; in [0, 1], 1 is best.

        ToW = Π_{S ∈ {D_f, D_r, T}} (1 − |acc(θ_u, S) − acc(θ_r, S)|)

    Source: Zhao et al., "What makes unlearning hard and what to do about it", NeurIPS 2024, arXiv:2406.01257. With
    membership scores in the place of the first pair it is their ToW-MIA.

    Args:
        unlearned: accuracies on the three sets.
        oracle: those of the retrained model, in the same order.

    >>> round(tug_of_war([0.1, 0.9, 0.8], [0.0, 1.0, 0.8]), 4)
    0.81
    """
    return float(np.prod([1 - abs(u - r) for u, r in zip(unlearned, oracle, strict=True)]))


def average_gap(unlearned: Mapping[str, float], oracle: Mapping[str, float]) -> float:
    """Mean absolute difference to the oracle over the measures that both name (UA, RA, TA, MIA); in [0, 1], 0 is best.

    Source: the convention of Jia et al., "Model sparsity can simplify machine unlearning", NeurIPS 2023,
    arXiv:2304.04934, and SalUn.

    Raises:
        ValueError: they name different measures.

    >>> round(average_gap({"UA": 0.9, "RA": 1.0}, {"UA": 1.0, "RA": 1.0}), 4)
    0.05
    """
    if unlearned.keys() != oracle.keys():
        raise ValueError(f"different measures: {sorted(unlearned)} and {sorted(oracle)}")
    return float(np.mean([abs(unlearned[k] - oracle[k]) for k in unlearned]))


def parameter_distance(unlearned: Sequence[ArrayLike], oracle: Sequence[ArrayLike]) -> float:
    """Relative Euclidean distance of two models' parameters, normalised by the retrained one's; ≥ 0.

        ‖θ_u − θ_r‖₂ / ‖θ_r‖₂

    Tells something only where both start from the same initialisation, or for closed-form solutions, where 1e-9 in
    float64 counts as equal. Public code normalises by either model.

    >>> parameter_distance([[3.0, 4.0]], [[0.0, 4.0]])
    0.75
    """
    squares = [(np.square(np.subtract(u, r, dtype=np.float64)).sum(), np.square(np.asarray(r, np.float64)).sum())
               for u, r in zip(unlearned, oracle, strict=True)]  # fmt: skip
    apart, size = (float(np.sqrt(sum(column))) for column in zip(*squares, strict=True))
    return apart / size if size else (0.0 if apart == 0 else float("inf"))


def logit_difference(z: ArrayLike, w: ArrayLike) -> float:
    """Largest difference of a logit, ≥ 0; inf where one model masks a class (−inf) that the other does not.

    >>> logit_difference([[1.0, -np.inf]], [[1.5, -np.inf]])
    0.5
    """
    a, b = np.asarray(z, dtype=np.float64), np.asarray(w, dtype=np.float64)
    with np.errstate(invalid="ignore"):
        apart = np.where(a == b, 0.0, np.abs(a - b))
    return float(apart.max(initial=0.0))


def indistinguishability(unlearned: Sequence[ArrayLike], oracles: Sequence[ArrayLike]) -> dict[str, float]:
    """Whether unlearned models can be told from retrained ones, over seeds of both, by their JS on the erased data.

    `inside`: mean JS between pairs of retrained models; `across`: between an unlearned and a retrained one;
    `relative`: |across − inside| / inside, 0 is best; `within_spread`: share of across values that do not exceed the
    largest inside value, 1 is best.

    Source: Liu et al., "Continual learning and private unlearning", CoLLAs 2022, arXiv:2203.12817, section 5.

    Args:
        unlearned: (n, C) probabilities of each unlearned model, ≥ 1.
        oracles: of each retrained one, ≥ 2.

    >>> a, b, c = [[0.5, 0.5]], [[0.6, 0.4]], [[0.55, 0.45]]
    >>> indistinguishability([c], [a, b])["within_spread"]
    1.0
    """
    inside = [js_divergence(a, b) for i, a in enumerate(oracles) for b in oracles[i + 1 :]]
    across = [js_divergence(a, b) for a in unlearned for b in oracles]
    middle, between = float(np.mean(inside)), float(np.mean(across))
    relative = abs(between - middle) / middle if middle else (0.0 if between == 0 else float("inf"))
    spread = float(np.mean(np.array(across) <= max(inside)))
    return {"inside": middle, "across": between, "relative": relative, "within_spread": spread}
