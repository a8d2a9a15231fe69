"""Metrics of sets that no experience learns: what learning costs, or adds, of what a model knew before.

Legend: n experiences have finished; A (n + 1, S) are scores in [0, 1] of S sets of questions, P (n + 1, F) perplexities
of F texts, NaN where not measured; row 0 is before the first experience, row i after i. Every function returns NaN
where a number that it needs is NaN.

Source: that general ability is measured before and after: Luo et al., "An Empirical Study of Catastrophic Forgetting in
Large Language Models During Continual Fine-tuning", 2023, arXiv:2308.08747; the numbers: this platform.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from clplat.metrics.matrix import Matrix
from clplat.metrics.record import RunRecord

NONE = "the stream has no set that is not learned, or loop.evaluate_on valid withholds it"


def general_accuracy(scores: Matrix) -> float:
    """Mean over sets of the last score; in [0, 1], higher is better.

        (1 / S) Σ_j A[n, j]

    Args:
        scores: A, (n + 1, S).

    >>> general_accuracy(np.array([[0.5, 0.75], [0.25, 0.75]]))
    0.5
    """
    return float(scores[-1].mean())


def general_drop(scores: Matrix) -> float:
    """Mean over sets of the score before the first experience minus the last; in [-1, 1], lower is better.

        (1 / S) Σ_j (A[0, j] − A[n, j])

    Args:
        scores: A, (n + 1, S).

    >>> general_drop(np.array([[0.5, 0.75], [0.25, 0.75]]))
    0.125
    """
    return float((scores[0] - scores[-1]).mean())


def general_perplexity(perplexities: Matrix) -> float:
    """Geometric mean over texts of the last perplexity; ≥ 1, lower is better.

        exp((1 / F) Σ_j ln P[n, j])

    Args:
        perplexities: P, (n + 1, F).

    >>> round(general_perplexity(np.array([[4.0, 8.0], [4.0, 16.0]])), 6)
    8.0
    """
    return float(np.exp(np.log(perplexities[-1]).mean()))


def general_perplexity_ratio(perplexities: Matrix) -> float:
    """Geometric mean over texts of the last perplexity over that before the first experience; > 0, lower is better.

        exp((1 / F) Σ_j ln (P[n, j] / P[0, j]))

    Args:
        perplexities: P, (n + 1, F).

    >>> round(general_perplexity_ratio(np.array([[4.0, 8.0], [4.0, 32.0]])), 6)
    2.0
    """
    return float(np.exp(np.log(perplexities[-1] / perplexities[0]).mean()))


def table(record: RunRecord) -> dict[str, dict[str, list[float | None]]] | None:
    """`general` of the summary: by what is measured, of each set its value in each row; None where there are none."""
    found: dict[str, dict[str, list[float | None]]] = {}
    for row in record.general:
        for what, sets in row.items():
            for name, value in sets.items():
                found.setdefault(what, {}).setdefault(name, []).append(value)
    return found or None


def latest(record: RunRecord) -> dict[str, float]:
    """What to log of the last row: `general/<set>` and `perplexity/<set>`."""
    last: dict[str, Any] = record.general[-1] if record.general else {}
    named = {"accuracy": "general", "perplexity": "perplexity"}
    return {f"{named[what]}/{k}": v for what, sets in last.items() for k, v in sets.items() if v is not None}
