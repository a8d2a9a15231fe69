"""Metrics of erasure: what is left of the erased data, and what of the rest.

Legend: R is the accuracy matrix of `clplat.metrics.matrix`, (n + 1, E). A request is a forget experience f; its own
column holds the accuracy on the erased data. `Request.erased` says which test samples of learn experiences it takes
away: from that row on they count no more as learned.

These suit the removal of classes, tasks or concepts (ideal forget accuracy 0 or chance). Where single samples are to
lose their influence, the ideal is the accuracy of a model trained anew without them: compare with such a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from clplat.metrics.matrix import Matrix, _mean


@dataclass(frozen=True)
class Request:
    """One forget experience.

    Args:
        index: its experience, hence its column.
        samples: size of its test set.
        erased: number of test samples it takes from each learn experience before it; empty when its test set shares
            no sample with theirs.
        taught_again: the first later learn experience that brings what it erased; what comes back from there on was
            asked for and is no relapse. None if there is none.
    """

    index: int
    samples: int
    erased: Mapping[int, int]
    taught_again: int | None = None

    def later(self, rows: int) -> range:
        """Rows of a matrix of `rows` rows in which what it erased may relapse."""
        return range(self.index + 2, rows if self.taught_again is None else min(rows, self.taught_again + 1))


def forget_accuracy(matrix: Matrix, requests: Sequence[Request]) -> float:
    """Accuracy on the erased data just after each request, averaged; in [0, 1], lower is better when erasing classes.

        FA = (1 / |Q|) Σ_{f ∈ Q} R[f + 1, f]

    Source: accuracy on the forget set, as in Fan et al., "SalUn", ICLR 2024, arXiv:2310.12508 (UA = 1 − FA); averaged
    over requests as in Liu et al., "Continual learning and private unlearning", CoLLAs 2022, arXiv:2203.12817.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.8], [0.9, 0.05]])
    >>> forget_accuracy(R, [Request(1, 50, {0: 50})])
    0.05
    """
    return _mean(matrix[q.index + 1, q.index] for q in requests)


def retain_accuracy(matrix: Matrix, requests: Sequence[Request], sizes: Mapping[int, int]) -> float:
    """Accuracy on the test samples learned and not erased, just after each request, averaged; in [0, 1], higher better.

        RA = (1 / |Q|) Σ_{f ∈ Q} (Σ_j n_j R[i, j] − Σ_{g ≤ f} n_g R[i, g]) / (Σ_j n_j − Σ_{g ≤ f} n_g),   i = f + 1

    j over learn experiences before f, g over requests up to f that take test samples away: the hits on what is kept
    are all hits minus those on what is erased, so that a test set of which a part is erased needs no second one.
    Pooled over samples. NaN where nothing is kept, or a request's test set lies in the learned ones only in part.

    Source: accuracy on the retain set, Acc_r of Zhao et al., "GS-LoRA", CVPR 2024, arXiv:2403.11530.

    Args:
        matrix: R, (n + 1, E).
        requests: forget experiences finished, in order.
        sizes: test samples of each learn experience finished, by index.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.8], [0.45, 0.0]])  # half of the 100 test samples are erased
    >>> retain_accuracy(R, [Request(1, 50, {0: 50})], {0: 100})  # 45 hits, none of them on the erased half
    0.9
    """
    return _mean(_retained(matrix, requests, sizes, q) for q in requests)


def forget_drop(matrix: Matrix, requests: Sequence[Request], finished: Sequence[int]) -> float:
    """Accuracy on the erased data before the requests minus after, averaged; in [0, 1], higher is better.

        Drop = (1 / |Q|) Σ_{f ∈ Q} max(0, R[b_f, f] − R[f + 1, f])

    b_f is the row before the first request of the unbroken sequence of requests that f belongs to: the model that
    the requests were made to, and not one that earlier requests have already changed.

    Source: Drop of Zhao et al., "GS-LoRA", CVPR 2024, arXiv:2403.11530, whose reference is the pre-trained model.

    Args:
        matrix: R, (n + 1, E).
        requests: forget experiences finished, in order.
        finished: indices of all forget experiences finished, which tell where a sequence of requests begins.

    >>> R = np.array([[0.1, 0.1, 0.1], [0.9, 0.8, 0.7], [0.9, 0.1, 0.3], [0.9, 0.1, 0.2]])
    >>> two = [Request(1, 10, {}), Request(2, 10, {})]
    >>> round(forget_drop(R, two, [1, 2]), 3)  # ((0.8 − 0.1) + (0.7 − 0.2)) / 2
    0.6
    """
    return _mean(_drop(matrix, finished, q) for q in requests)


def h_mean(matrix: Matrix, requests: Sequence[Request], sizes: Mapping[int, int], finished: Sequence[int]) -> float:
    """Harmonic mean of retain accuracy and drop after each request, averaged; in [0, 1], higher is better.

        H = (1 / |Q|) Σ_{f ∈ Q} 2 RA_f Drop_f / (RA_f + Drop_f),   0 where both are 0

    RA_f and Drop_f are the terms of `retain_accuracy` and `forget_drop`; the reference of the drop is the model
    before the first of an unbroken sequence of requests.

    Source: H-Mean of Zhao et al., "GS-LoRA", CVPR 2024, arXiv:2403.11530.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.8], [0.45, 0.0]])
    >>> round(h_mean(R, [Request(1, 50, {0: 50})], {0: 100}, [1]), 4)  # of 0.9 and 0.8
    0.8471
    """

    return _mean(_harmonic(_retained(matrix, requests, sizes, q), _drop(matrix, finished, q)) for q in requests)


def h_step(matrix: Matrix, requests: Sequence[Request], sizes: Mapping[int, int]) -> float:
    """As `h_mean`, with the model just before each request as the reference of its drop; in [0, 1], higher is better.

        H_step = (1 / |Q|) Σ_{f ∈ Q} 2 RA_f D_f / (RA_f + D_f),   D_f = max(0, R[f, f] − R[f + 1, f])

    Where earlier requests have already harmed what a later one erases, `h_mean` credits the later one and this does
    not. The published H has the pre-trained model as its reference throughout.

    Source: this platform, after Zhao et al., "GS-LoRA", CVPR 2024, arXiv:2403.11530.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.8], [0.45, 0.0]])
    >>> round(h_step(R, [Request(1, 50, {0: 50})], {0: 100}), 4)
    0.8471
    """
    return _mean(_harmonic(_retained(matrix, requests, sizes, q), _drop(matrix, (), q)) for q in requests)


def retention_loss(matrix: Matrix, requests: Sequence[Request], sizes: Mapping[int, int]) -> float:
    """Accuracy that a request costs on each test set learned and not erased, averaged; in [-1, 1], lower is better.

        RL = (1 / |Q|) Σ_{f ∈ Q} (1 / |A_f|) Σ_{g ∈ A_f} (a[f, g] − a[f + 1, g])

    a[i, g] is the accuracy of row i on what the requests up to f leave of test set g, A_f the test sets of which
    something is left: both rows are over the same samples. NaN where nothing is left.

    Source: the stability of Liu et al., "Continual learning and private unlearning", CoLLAs 2022, arXiv:2203.12817,
    taken over one request.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.8], [0.45, 0.0]])  # what is left of the 100: 1.0 before, 0.9 after
    >>> round(retention_loss(R, [Request(1, 50, {0: 50})], {0: 100}), 3)
    0.1
    """
    return _mean(_lost(matrix, requests, sizes, q) for q in requests)


def per_request(
    matrix: Matrix, requests: Sequence[Request], sizes: Mapping[int, int], finished: Sequence[int]
) -> list[dict[str, float]]:
    """The terms of the means above, one dict a request under the metrics' names; NaN where not defined.

    Args: as of `h_mean`.

    >>> R = np.array([[0.1, 0.1], [0.9, 0.8], [0.45, 0.0]])
    >>> per_request(R, [Request(1, 50, {0: 50})], {0: 100}, [1])[0]["forget_drop"]
    0.8
    """
    found = []
    for q in requests:
        kept, drop, step = _retained(matrix, requests, sizes, q), _drop(matrix, finished, q), _drop(matrix, (), q)
        found.append({
            "forget_accuracy": float(matrix[q.index + 1, q.index]), "retain_accuracy": kept, "forget_drop": drop,
            "h_mean": _harmonic(kept, drop), "h_step": _harmonic(kept, step),
            "retention_loss": _lost(matrix, requests, sizes, q), "relapse": relapse(matrix, [q]),
        })  # fmt: skip
    return found


def relapse(matrix: Matrix, requests: Sequence[Request]) -> float:
    """Accuracy that erased data regain, averaged over requests with an experience after; in [-1, 1], lower is better.

        Rel = (1 / |Q|) Σ_{f ∈ Q} (max_{i > f + 1} R[i, f] − R[f + 1, f])

    Rows from a later learn experience on that teaches the same classes again do not count.

    Source: task relapse of "UnCLe", 2025, arXiv:2509.17530.

    >>> R = np.array([[0.1, 0.1, 0.1], [0.9, 0.8, 0.1], [0.9, 0.1, 0.1], [0.9, 0.4, 0.9]])
    >>> round(relapse(R, [Request(1, 10, {})]), 3)
    0.3
    """
    followed = [q for q in requests if q.later(len(matrix))]
    return _mean(np.max(matrix[q.later(len(matrix)), q.index]) - matrix[q.index + 1, q.index] for q in followed)


def kept_accuracy(row: NDArray[np.floating], requests: Sequence[Request], sizes: Mapping[int, int]) -> dict[int, float]:
    """Accuracy of each learned test set on what `requests` leave of it, by column; in [0, 1].

    An untouched test set keeps its accuracy; one erased as a whole is absent. Those erased in part share one number,
    the accuracy over all that is left of them, since a request's column is one number over all that it erased. NaN
    where a request's test set lies in the learned ones only in part.

    Args:
        row: (E,) one row of the accuracy matrix.
        requests: those in force at this row.
        sizes: test samples of each test set learned by this row, by index.

    >>> kept_accuracy(np.array([0.9, 0.45, 0.0]), [Request(2, 50, {1: 50})], {0: 100, 1: 100})
    {0: 0.9, 1: 0.9}
    """
    if not requests:
        return dict(zip(sizes, row[list(sizes)].tolist(), strict=True))
    lost = dict.fromkeys(sizes, 0)
    for q in requests:
        for j, samples in q.erased.items():
            lost[j] = lost.get(j, 0) + samples
    touched = {j: n for j, n in sizes.items() if lost[j]}
    left = pooled_accuracy(row, requests, touched)
    kept = {j: left if lost[j] else float(row[j]) for j in sizes}
    return {j: v for j, v in kept.items() if lost[j] < sizes[j]}


def _retained(matrix: Matrix, requests: Sequence[Request], sizes: Mapping[int, int], q: Request) -> float:
    """Accuracy after request `q` over all test samples learned before it and not erased by then."""
    learned = {j: n for j, n in sizes.items() if j < q.index}
    return pooled_accuracy(matrix[q.index + 1], [g for g in requests if g.index <= q.index], learned)


def pooled_accuracy(row: NDArray[np.floating], requests: Sequence[Request], sizes: Mapping[int, int]) -> float:
    """Accuracy over all samples of the learned test sets less those erased, each sample with equal weight; in [0, 1].

        (Σ_j N_j R[i, j] − hits on erased) / (Σ_j N_j − samples erased)

    NaN where a request's test set lies in the learned ones only in part. Without requests, the accuracy over all
    classes met of Rebuffi et al., "iCaRL", CVPR 2017, arXiv:1611.07725.

    Args:
        row: (E,) row i of the accuracy matrix.
        requests: those in force at this row.
        sizes: N_j, test samples of each test set learned by this row, by index.

    >>> pooled_accuracy(np.array([0.9, 0.5]), [], {0: 300, 1: 100})
    0.8
    """
    hits, total = sum(n * row[j] for j, n in sizes.items()), sum(sizes.values())
    for q in requests:
        if not q.erased:
            continue
        if sum(q.erased.values()) != q.samples:
            return float("nan")
        hits, total = hits - q.samples * row[q.index], total - q.samples
    accuracy = float(hits / total) if total > 0 else float("nan")
    # Hits are recovered from accuracies, so rounding may leave [0, 1] by a little; more means the counts are not true.
    inside = min(max(accuracy, 0.0), 1.0)
    return inside if abs(inside - accuracy) < 1e-6 else float("nan")


def _harmonic(kept: float, drop: float) -> float:
    """Harmonic mean; 0 where both are 0."""
    return 0.0 if kept + drop == 0 else 2 * kept * drop / (kept + drop)


def _lost(matrix: Matrix, requests: Sequence[Request], sizes: Mapping[int, int], q: Request) -> float:
    """Mean accuracy lost by request `q` over the test sets of which it leaves something."""
    learned, done = {j: n for j, n in sizes.items() if j < q.index}, [g for g in requests if g.index <= q.index]
    before, after = (kept_accuracy(matrix[i], done, learned) for i in (q.index, q.index + 1))
    return _mean(before[j] - after[j] for j in before)


def _drop(matrix: Matrix, finished: Sequence[int], q: Request) -> float:
    """Accuracy lost on the erased data of `q` since the unbroken sequence of requests that it belongs to began."""
    first = q.index
    while first - 1 in finished:
        first -= 1
    drop = float(matrix[first, q.index] - matrix[q.index + 1, q.index])
    return max(0.0, drop) if not np.isnan(drop) else drop
