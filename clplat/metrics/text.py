"""Scores of a generated answer against a reference; each in [0, 1], higher is better.

An answer with several references gets the best of its scores.
"""

from __future__ import annotations

import re
import string
from collections.abc import Callable

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """Lower case, without punctuation, with single spaces.

    >>> normalized(" Science or  Technology. ")
    'science or technology'
    """
    return " ".join(text.lower().translate(_PUNCTUATION).split())


def exact_match(answer: str, reference: str) -> float:
    """1 where both are equal once normalised (see `normalized`).

    Source: Rajpurkar et al., "SQuAD", EMNLP 2016, arXiv:1606.05250, whose script also drops articles; without that as
    in Wang et al., "O-LoRA", arXiv:2310.14152.

    >>> exact_match("True.", "true"), exact_match("not true", "true")
    (1.0, 0.0)
    """
    return float(normalized(answer) == normalized(reference))


def choice(answer: str, reference: str) -> float:
    """1 where the first of the capital letters A to E that stands alone is the same in both.

    Source: Wang et al., "TRACE", arXiv:2310.06762, which compares first letters.

    >>> choice("A. because it rains", "A"), choice("I think B", "A"), choice("", "A")
    (1.0, 0.0, 0.0)
    """
    found = [re.search(r"(?<![A-Za-z])[A-E](?![A-Za-z])", text) for text in (answer, reference)]
    return float(found[0] is not None and found[1] is not None and found[0][0] == found[1][0])


def rouge_l(answer: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, by torchmetrics, without stemming.

    Source: Lin, "ROUGE: A Package for Automatic Evaluation of Summaries", 2004, section 3.

    >>> round(rouge_l("the cat sat", "the cat sat on the mat"), 4)
    0.6667
    """
    from torchmetrics.functional.text.rouge import rouge_score

    return float(rouge_score(answer, reference, rouge_keys="rougeL")["rougeL_fmeasure"])


def rouge_l_recall(answer: str, reference: str) -> float:
    """Share of the reference's words in the longest common subsequence of words, by torchmetrics, without stemming.

    TOFU's code stems words first (Porter), which counts a few more of them as equal.

    Source: Lin, 2004, section 3; for unlearning: Maini et al., "TOFU", COLM 2024, arXiv:2401.06121.

    >>> rouge_l_recall("it is the big cat that sat", "the cat sat down")
    0.75
    """
    from torchmetrics.functional.text.rouge import rouge_score

    return float(rouge_score(answer, reference, rouge_keys="rougeL")["rougeL_recall"])


def similarity(answer: str, reference: str) -> float:
    """2 M / T, M characters in matching blocks of T in both: the ratio of Python's difflib.

    Source: Ratcliff and Metzener, "Pattern Matching: The Gestalt Approach", 1988; in TRACE, arXiv:2310.06762, for code.

    >>> similarity("x = 1", "x = 2")
    0.8
    """
    import difflib

    return difflib.SequenceMatcher(None, answer, reference, autojunk=False).ratio()


TEXT_METRICS: dict[str, Callable[[str, str], float]] = {
    "exact_match": exact_match,
    "choice": choice,
    "rouge_l": rouge_l,
    "rouge_l_recall": rouge_l_recall,
    "similarity": similarity,
}
