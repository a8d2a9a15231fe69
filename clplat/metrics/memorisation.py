"""What a language model still knows of erased texts: the measures of TOFU, MUSE and open-unlearning.

Where nothing else is said, a measure is to be read beside that of a model retrained without the texts: it too writes
much of an erased text by chance or by what it knows of the language. Forget quality and privacy leakage need one.

Legend: n questions, K wrong answers to each, T tokens of a text. The loss L(a) of an answer is the mean of −ln p over
its tokens given the question; e^−L(a) is its probability to the power of one over its length.

Sources: Maini et al., "TOFU", COLM 2024, arXiv:2401.06121; Shi et al., "MUSE", ICLR 2025, arXiv:2407.06460; Dorna et
al., "OpenUnlearning", 2025, arXiv:2506.12618, for extraction strength after Carlini et al., USENIX Security 2021,
arXiv:2012.07805. Compared with the authors' code on the numbers that it ships with.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
from numpy.typing import ArrayLike

from clplat.metrics.membership import Array, auc

UTILITY = 9  # probability, ROUGE-L recall and truth ratio of each: retained authors, real authors, facts of the world


def truth_ratios(right: ArrayLike, wrong: ArrayLike) -> Array:
    """Truth ratio (n,) of each question, ≥ 0: below 1 the model holds the right answer for more likely than wrong ones.

        R = exp(L(ã) − (1 / K) Σ_k L(â_k))

    Differs: the mean over wrong answers is one of losses, as in the script that the authors' numbers come from and in
    open-unlearning, and not one of probabilities, as in the paper's equation 1 and in a second copy of the script: on
    the authors' own log of a model that knows everything, utility is 0.623 the one way and 0.586 the other.

    Args:
        right: (n,) losses of a paraphrase of the right answer; of the answer itself where there is no paraphrase.
        wrong: (n, K) losses of wrong answers of the same form.

    >>> truth_ratios([0.0], [[np.log(2), np.log(8)]]).round(6).tolist()
    [0.25]
    """
    return np.exp(np.asarray(right, dtype=np.float64) - np.asarray(wrong, dtype=np.float64).mean(axis=1))


def kept_truth(ratios: ArrayLike) -> float:
    """Mean over what is to be kept of max(0, 1 − R); in [0, 1], 1 where only right answers have any probability.

    >>> kept_truth([0.25, 3.0])
    0.375
    """
    return float(np.maximum(0.0, 1 - np.asarray(ratios, dtype=np.float64)).mean())


def erased_truth(ratios: ArrayLike) -> float:
    """Mean over what was erased of min(R, 1 / R); in [0, 1], 1 where right and wrong answers are alike.

    >>> erased_truth([0.25, 4.0, 1.0])
    0.5
    """
    found = np.asarray(ratios, dtype=np.float64)
    with np.errstate(divide="ignore"):
        return float(np.minimum(found, 1 / found).mean())


def forget_quality(unlearned: ArrayLike, retrained: ArrayLike) -> float:
    """p-value that truth ratios of both models come from one distribution; in [0, 1], small: they can be told apart.

    Of the two-sample test of Kolmogorov and Smirnov, which is the same for R and for 1 / R. It shrinks with the number
    of questions: compare values on the same questions only. A large value is no proof of likeness.

    Args:
        unlearned: (n,) truth ratios on the erased questions.
        retrained: (m,) those of a model trained without them.

    >>> forget_quality([0.1, 0.2, 0.3], [0.1, 0.2, 0.3])
    1.0
    """
    from scipy.stats import ks_2samp

    return float(ks_2samp(np.asarray(unlearned, np.float64), np.asarray(retrained, np.float64)).pvalue)


def probability(losses: ArrayLike) -> float:
    """Mean over questions of e^−L of the right answer; in [0, 1].

    >>> probability([0.0, np.log(4)])
    0.625
    """
    return float(np.exp(-np.asarray(losses, dtype=np.float64)).mean())


def probability_among(right: ArrayLike, wrong: ArrayLike) -> float:
    """Mean over questions of the right answer's share of the probability of all answers given; in [0, 1].

        e^−L(a) / (e^−L(a) + Σ_k e^−L(â_k))

    TOFU's probability where there are answers to choose from: real authors, facts of the world.

    Args:
        right: (n,) losses.
        wrong: (n, K).

    >>> probability_among([1.0], [[1.0, 1.0, 1.0]])
    0.25
    """
    p, q = np.exp(-np.asarray(right, dtype=np.float64)), np.exp(-np.asarray(wrong, dtype=np.float64))
    return float((p / (p + q.sum(axis=1))).mean())


def model_utility(values: Collection[float]) -> float:
    """Harmonic mean of TOFU's nine measures of what is kept; in [0, 1], 0 where one of them is.

    Probability, ROUGE-L recall and truth ratio (`kept_truth`) of retained authors, real authors and facts of the world.

    Raises:
        ValueError: not nine values: a mean over fewer is another quantity.

    >>> round(model_utility([0.5] * 8 + [1.0]), 4)
    0.5294
    """
    from scipy.stats import hmean

    if len(values) != UTILITY:
        raise ValueError(f"model utility is of nine measures, not of {len(values)}")
    return float(hmean(np.asarray(list(values), dtype=np.float64)))


def min_k(log_probabilities: ArrayLike, share: float = 0.4) -> float:
    """Min-K% score of a text in nats, ≥ 0: −mean of ln p over the share of its tokens that are least likely.

    Low where the model has seen the text. At least one token counts; the number of tokens is rounded down.

    Source: Shi et al., "Detecting pretraining data from large language models", ICLR 2024, arXiv:2310.16789; MUSE
    takes 40 %.

    Args:
        log_probabilities: (T,) of each token given those before it, T ≥ 1.
        share: in (0, 1].

    >>> min_k([-1.0, -4.0, -0.5, -2.0, -3.0])
    3.5
    """
    found = np.sort(np.asarray(log_probabilities, dtype=np.float64))
    return float(-found[: max(1, int(len(found) * share))].mean())


def text_auc(erased: ArrayLike, unseen: ArrayLike) -> float:
    """Chance that an erased text has a lower Min-K% score than one never seen, ties counted half; in [0, 1].

    MUSE's code gives 1 − this.

    >>> text_auc([1.0, 2.0], [3.0, 1.5])
    0.75
    """
    return auc(-np.asarray(erased, dtype=np.float64), -np.asarray(unseen, dtype=np.float64))


def privacy_leakage(unlearned: float, retrained: float) -> float | None:
    """MUSE's PrivLeak in per cent; 0 is best, below 0: forgotten too little, above 0: too much. ≥ −100.

        100 · ((1 − A_u) − (1 − A_r)) / (1 − A_r)

    None where the retrained model itself tells every erased text from the unseen ones (A_r = 1).

    Args:
        unlearned: A_u, `text_auc` of the unlearned model.
        retrained: A_r, of one trained without the erased texts, on the same texts.

    >>> privacy_leakage(0.75, 0.5), privacy_leakage(0.5, 0.5), privacy_leakage(0.25, 0.5)
    (-50.0, 0.0, 50.0)
    """
    return None if retrained >= 1 else 100 * (retrained - unlearned) / (1 - retrained)


def exact_memorisation(greedy: ArrayLike, tokens: ArrayLike) -> float:
    """Share of a text's tokens that are the most likely one given those before; in [0, 1].

    Args:
        greedy: (T,) ids of the most likely tokens, each given the text's own tokens before it.
        tokens: (T,) ids of the text.

    >>> exact_memorisation([5, 6, 7, 9], [5, 6, 7, 8])
    0.75
    """
    return float((np.asarray(greedy) == np.asarray(tokens)).mean())


def extraction_strength(greedy: ArrayLike, tokens: ArrayLike) -> float:
    """Share of a text that the model writes by itself once it is given what comes before; in [0, 1].

        1 − k / T, k the shortest prefix after which every token is the most likely one

    0 where the last token is not. Public code gives 1 / T there, as if it were.

    Args: as those of `exact_memorisation`.

    >>> extraction_strength([1, 6, 7, 8], [5, 6, 7, 8]), extraction_strength([5, 6, 7, 9], [5, 6, 7, 8])
    (0.75, 0.0)
    """
    wrong = np.flatnonzero(np.asarray(greedy) != np.asarray(tokens))
    return 1 - float(wrong[-1] + 1 if len(wrong) else 0) / len(np.asarray(tokens))
