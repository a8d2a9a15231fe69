"""Metrics of learning without forgetting: pure functions of the accuracy matrix.

Legend: R is the accuracy matrix, (n + 1, E) float in [0, 1] with NaN where not measured: E experiences, of which n have
finished; row 0 is before any training, row i after i experiences; column j is the test set of experience j (from 0),
which is learned between rows j and j + 1. `columns` are the indices of the test sets that count: those of learn
experiences, in streams of mixed kinds. Rows of other kinds stay in: accuracy that an adaptation costs is forgetting.

Every function returns NaN where no column qualifies or an accuracy it needs is NaN: no column is dropped in silence.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.floating]


def average_accuracy(matrix: Matrix, columns: Sequence[int]) -> float:
    """Mean of the last row over `columns`; in [0, 1], higher is better.

        A = (1 / |C|) Σ_{j ∈ C} R[n, j]

    Source: Lopez-Paz and Ranzato, NeurIPS 2017, arXiv:1706.08840, equation 2.

    Args:
        matrix: R, (n + 1, E).
        columns: test sets of the learn experiences finished and not erased.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.2], [0.5, 0.8]])
    >>> round(average_accuracy(R, [0, 1]), 3)
    0.65
    """
    return _mean(matrix[-1:, list(columns)].ravel())


def average_incremental_accuracy(matrix: Matrix, active: NDArray[np.bool_]) -> float:
    """Mean over rows of the average accuracy at that row; in [0, 1], higher is better.

        AIA = (1 / |I|) Σ_{i ∈ I} (1 / |C_i|) Σ_{j ∈ C_i} R[i, j],   I the rows with a non-empty C_i

    Every test set counts alike, however large: where they differ in size, the figure of Rebuffi et al. ("iCaRL"), over
    all samples met, is another one (`unlearning.pooled_accuracy`).

    Source: the accuracy A_i of Lopez-Paz and Ranzato, arXiv:1706.08840; its mean over rows: this platform.

    Args:
        matrix: R, (n + 1, E).
        active: (n + 1, E) bool; row i marks C_i, the test sets learned by row i and not erased.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.2], [0.5, 0.8]])
    >>> round(average_incremental_accuracy(R, np.array([[False, False], [True, False], [True, True]])), 3)
    0.775
    """
    if not len(matrix) or np.isnan(matrix[-1, active[-1]]).any():
        return float("nan")
    counts = active.sum(1)
    sums = np.where(active, matrix, 0.0).sum(1)
    return _mean(sums[counts > 0] / counts[counts > 0])


def forgetting(matrix: Matrix, columns: Sequence[int]) -> float:
    """Best accuracy any earlier row had, minus the last one's; in [-1, 1], lower is better.

        F = (1 / |C|) Σ_{j ∈ C} (max_{1 ≤ l < n} R[l, j] − R[n, j])

    over the test sets with an experience after their own. The maximum runs over all rows after training began, also
    those before j was learned, as in the source; those alone may be NaN.

    Source: Chaudhry et al., "Riemannian walk", ECCV 2018, arXiv:1801.10112, forgetting measure.

    Args:
        matrix: R, (n + 1, E).
        columns: test sets of learn experiences of which nothing is erased.

    >>> R = np.array([[0.1, 0.1, 0.1], [0.7, 0.2, 0.1], [0.9, 0.8, 0.1], [0.5, 0.9, 0.8]])
    >>> round(forgetting(R, [0, 1, 2]), 3)  # ((0.9 − 0.5) + (0.8 − 0.9)) / 2
    0.15
    """
    last = len(matrix) - 1
    past = [j for j in columns if j + 1 < last]
    if not past or np.isnan(matrix[-1, past]).any():  # where only the newest is scored: no need to look further
        return float("nan")
    scores = matrix[1:, past]  # (n, |C|)
    since = np.arange(1, last + 1)[:, None] > past
    if (np.isnan(scores) & since).any():
        return float("nan")
    return _mean(np.fmax.reduce(scores[:-1]) - scores[-1])


def backward_transfer(matrix: Matrix, columns: Sequence[int]) -> float:
    """Last accuracy minus the accuracy just after learning; in [-1, 1], higher is better.

        BWT = (1 / |C|) Σ_{j ∈ C} (R[n, j] − R[j + 1, j])   over the test sets with an experience after their own

    Its negative is what Avalanche calls forgetting.

    Source: Lopez-Paz and Ranzato, NeurIPS 2017, arXiv:1706.08840, equation 3.

    Args:
        matrix: R, (n + 1, E).
        columns: test sets of learn experiences of which nothing is erased.

    >>> R = np.array([[0.1, 0.1, 0.1], [0.7, 0.2, 0.1], [0.9, 0.8, 0.1], [0.5, 0.9, 0.8]])
    >>> round(backward_transfer(R, [0, 1, 2]), 3)  # ((0.5 − 0.7) + (0.9 − 0.8)) / 2
    -0.05
    """
    past = np.array([j for j in columns if j + 2 < len(matrix)], dtype=int)
    return _mean(matrix[-1:, past].ravel() - matrix[past + 1, past])


def forward_transfer(matrix: Matrix, columns: Sequence[int]) -> float:
    """Accuracy just before learning minus that of the untrained model; in [-1, 1], higher is better.

        FWT = (1 / |C|) Σ_{j ∈ C} (R[j, j] − R[0, j])   over the test sets with an experience before their own

    Row 0 is the source's random initialisation; with pre-trained weights it is the zero-shot accuracy.

    Source: Lopez-Paz and Ranzato, NeurIPS 2017, arXiv:1706.08840, equation 4.

    Args:
        matrix: R, (n + 1, E).
        columns: test sets of learn experiences finished.

    >>> R = np.array([[0.1, 0.1, 0.1], [0.7, 0.2, 0.1], [0.9, 0.8, 0.4], [0.5, 0.9, 0.8]])
    >>> round(forward_transfer(R, [0, 1, 2]), 3)  # ((0.2 − 0.1) + (0.4 − 0.1)) / 2
    0.2
    """
    later = np.array([j for j in columns if 0 < j < len(matrix) - 1], dtype=int)
    return _mean(matrix[later, later] - matrix[:1, later].ravel())


def transfer(matrix: Matrix, columns: Sequence[int]) -> float:
    """Transfer of zero-shot protocols: accuracy on test sets before they are learned; in [0, 1], higher is better.

        Transfer = mean over j ∈ C, j > 0, of (1 / j) Σ_{1 ≤ i ≤ j} R[i, j]

    Row 0, before any training, does not count.

    Source: Zheng et al., "Preventing Zero-Shot Transfer Degradation" (ZSCL), ICCV 2023, arXiv:2303.06628, section 4.

    Args:
        matrix: R, (n + 1, E).
        columns: test sets of learn experiences finished.

    >>> R = np.array([[0.1, 0.1, 0.1], [0.7, 0.2, 0.1], [0.9, 0.8, 0.4], [0.5, 0.9, 0.8]])
    >>> round(transfer(R, [0, 1, 2]), 3)  # (0.2 + (0.1 + 0.4) / 2) / 2
    0.225
    """
    later = [j for j in columns if j > 0]
    if len(matrix) < 2 or np.isnan(matrix[1, later]).any():
        return float("nan")
    before = np.arange(1, len(matrix))[:, None] <= later  # (n, |C|)
    return _mean(np.where(before, matrix[1:, later], 0.0).sum(0) / np.array(later))


def average(matrix: Matrix, columns: Sequence[int]) -> float:
    """Average of zero-shot protocols: accuracy over all stages and test sets, learned yet or not; in [0, 1], higher is
    better.

        Average = (1 / |C|) Σ_{j ∈ C} (1 / n) Σ_{1 ≤ i ≤ n} R[i, j]

    Source: Zheng et al., "Preventing Zero-Shot Transfer Degradation" (ZSCL), ICCV 2023, arXiv:2303.06628, section 4.

    Args:
        matrix: R, (n + 1, E).
        columns: test sets of learn experiences finished.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.2], [0.5, 0.8]])
    >>> round(average(R, [0, 1]), 3)
    0.6
    """
    if len(matrix) < 2 or np.isnan(matrix[-1, columns]).any():
        return float("nan")
    return _mean(matrix[1:, columns].mean(0))


def last(matrix: Matrix, columns: Sequence[int]) -> float:
    """Last of zero-shot protocols: mean of the last row; in [0, 1], higher is better.

        Last = (1 / |C|) Σ_{j ∈ C} R[n, j]

    The same as the average accuracy where nothing is erased.

    Source: Zheng et al., "Preventing Zero-Shot Transfer Degradation" (ZSCL), ICCV 2023, arXiv:2303.06628, section 4.

    Args:
        matrix: R, (n + 1, E).
        columns: test sets of learn experiences finished.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.2], [0.5, 0.8]])
    >>> round(last(R, [0, 1]), 3)
    0.65
    """
    return _mean(matrix[-1:, list(columns)].ravel())


def plasticity(matrix: Matrix, columns: Sequence[int]) -> float:
    """Learning accuracy: mean accuracy on each test set just after learning it; in [0, 1], higher is better.

        LA = (1 / |C|) Σ_{j ∈ C} R[j + 1, j]

    Source: Riemer et al., "Learning to learn without forgetting", ICLR 2019, arXiv:1810.11910, LA.

    Args:
        matrix: R, (n + 1, E).
        columns: test sets of learn experiences finished.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.2], [0.5, 0.8]])
    >>> round(plasticity(R, [0, 1]), 3)
    0.85
    """
    learned = np.array(columns, dtype=int)
    return _mean(matrix[learned + 1, learned])


def relative_plasticity(matrix: Matrix, reference: Matrix, columns: Sequence[int]) -> float:
    """Learning accuracy as a share of a reference run's; ≥ 0, higher is better.

        LA(R) / LA(R*)

    1 means as plastic as the reference (a naive run, say), below 1 that plasticity was given up. A ratio of means, not
    a mean of ratios: one test set the reference fails on does not decide it. NaN where LA(R*) is 0.

    Source: learning accuracy of Riemer et al., ICLR 2019, arXiv:1810.11910; the ratio is this platform's.

    Args:
        matrix: R, (n + 1, E).
        reference: R*, (m + 1, E) of a run on the same stream.
        columns: test sets of learn experiences finished in both runs.

    >>> R = np.array([[0.1, 0.1], [0.6, 0.2], [0.5, 0.6]])
    >>> round(relative_plasticity(R, np.array([[0.1, 0.1], [0.9, 0.2], [0.5, 0.7]]), [0, 1]), 3)
    0.75
    """
    ours, theirs = plasticity(matrix, columns), plasticity(reference, columns)
    return ours / theirs if theirs > 0 else float("nan")


def stability(matrix: Matrix, columns: Sequence[int]) -> float:
    """Remembering (REM): one minus the mean loss on past test sets, over all rows; in [0, 1], higher is better.

        REM = 1 − |min(B, 0)|,   B = mean over all pairs (i, j), j ∈ C, j + 1 < i ≤ n, of R[i, j] − R[j + 1, j]

    Every row counts, so that a loss recovered by the end still shows. Gains elsewhere offset losses within B, but
    no gain lifts REM above 1.

    Source: Díaz-Rodríguez et al., "Don't forget, there is more than forgetting", 2018, arXiv:1810.13166, REM.

    Args:
        matrix: R, (n + 1, E).
        columns: test sets of learn experiences of which nothing is erased.

    >>> R = np.array([[0.1, 0.1, 0.1], [0.9, 0.2, 0.1], [0.6, 0.8, 0.1], [0.9, 0.5, 0.8]])
    >>> round(stability(R, [0, 1, 2]), 3)  # B = (−0.3 + 0 − 0.3) / 3
    0.8
    """
    past = [j for j in columns if j + 2 < len(matrix)]
    if not past or np.isnan(matrix[-1, past]).any():
        return float("nan")
    learned = np.array(past) + 1
    after = np.arange(len(matrix))[:, None] > learned  # (n + 1, |C|)
    change = float(np.where(after, matrix[:, past] - matrix[learned, past], 0.0).sum() / after.sum())
    return 1.0 + min(change, 0.0) if not np.isnan(change) else change


def intransigence(matrix: Matrix, reference: Matrix, columns: Sequence[int]) -> float:
    """What a jointly trained reference reaches on each new test set beyond this run; in [-1, 1], lower is better.

        I = (1 / |C|) Σ_{j ∈ C} (R*[j + 1, j] − R[j + 1, j])

    Source: Chaudhry et al., "Riemannian walk", ECCV 2018, arXiv:1801.10112, there for one j, here its mean.

    Args:
        matrix: R, (n + 1, E).
        reference: R*, (m + 1, E) of a run that trains on all data met so far (a joint run).
        columns: test sets of learn experiences finished in both runs.

    >>> R = np.array([[0.1, 0.1], [0.6, 0.2], [0.5, 0.6]])
    >>> round(intransigence(R, np.array([[0.1, 0.1], [0.9, 0.2], [0.9, 0.7]]), [0, 1]), 3)
    0.2
    """
    return plasticity(reference, columns) - plasticity(matrix, columns)


def _mean(values: Iterable[float]) -> float:
    """Mean, NaN if there are none or one of them is NaN."""
    listed = values.tolist() if isinstance(values, np.ndarray) else [float(v) for v in values]
    return sum(listed) / len(listed) if listed else float("nan")
