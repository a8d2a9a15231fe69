"""Ranks of strategies over several streams, and what can be told of them. Imports no torch.

What is computed, and why
    Ranks      Within each stream strategies are ranked by their mean over seeds (1 is best, equal ones share the mean
               of their ranks); figures of different streams do not add up, their ranks do (Demšar, Journal of Machine
               Learning Research 7, 2006).
    Friedman   Whether the mean ranks R_j of k strategies over N streams differ at all: with r_ij the ranks,
               χ² = (k - 1) N² Σ_j (R_j - (k + 1) / 2)² / (Σ_ij r_ij² - N k (k + 1)² / 4), which is
               12 N / (k (k + 1)) [Σ_j R_j² - k (k + 1)² / 4] where no ranks are shared. Its p-value is exact: the share
               of all permutations of ranks within streams with a χ² as large. The F distribution that Demšar takes is
               good for many streams only: of 3 that agree it gives p = 0, where (k!)^(1 - N) is the least there is.
    Nemenyi    Once Friedman's test has found a difference, two strategies are told apart whose mean ranks lie
               CD = q(0.05, k) √(k (k + 1) / (6 N)) apart or more, with q of the studentized range, over √2.
    Wilcoxon   Nemenyi's verdict on a pair depends on who else is ranked (Benavoli, Corani and Mangili, same journal 17,
               2016), so each pair is tested alone, too: signed ranks of the differences of means over streams, zero
               differences counting for neither, exact over all patterns of signs, Holm-corrected over pairs.
    None of them knows how sure a mean over seeds is, and all take streams for independent: those cut from one data set
    are not.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from clplat.report.compare import Group, evaluated_on, higher_is_better, holm, sign_flip_test
from clplat.report.numbers import show_p
from clplat.report.tables import ALPHA, primary_metric

# Permutations of ranks that are enumerated; beyond, so many less one are drawn from a fixed seed.
_PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Pair:
    """Two strategies over all streams.

    Args:
        difference: mean rank of the second minus that of the first, ≥ 0.
        p_value: of Wilcoxon's signed ranks, two-sided.
        p_holm: corrected over all pairs.
    """

    first: str
    second: str
    difference: float
    p_value: float
    p_holm: float


@dataclass(frozen=True)
class Ranking:
    """Strategies ranked on one metric over N ≥ 2 streams.

    Args:
        metric: that all are ranked by.
        validation: whether figures are of validation data.
        strategies: labels of the k ≥ 2 that every stream has, best mean rank first; `ranks` and `means` are in this
            order.
        streams: their labels.
        ranks: of each stream (N), of each strategy (k).
        means: mean rank of each strategy.
        chi_squared: Friedman's; None where all ranks of every stream are equal.
        p_value: of Friedman's test.
        smallest: the p-value of N streams that all agree: no result could have a smaller one.
        critical_difference: Nemenyi's, at 0.05.
        left_out: labels that some of the streams lack.
    """

    metric: str
    validation: bool
    strategies: tuple[str, ...]
    streams: tuple[str, ...]
    ranks: tuple[tuple[float, ...], ...]
    means: tuple[float, ...]
    chi_squared: float | None
    p_value: float
    smallest: float
    critical_difference: float
    pairs: tuple[Pair, ...]
    left_out: tuple[str, ...] = ()

    @property
    def can_tell(self) -> bool:
        """Whether so few streams could show any difference at all."""
        return self.smallest <= ALPHA

    @property
    def differs(self) -> bool:
        """Whether Friedman's test finds a difference."""
        return self.can_tell and self.p_value <= ALPHA

    @property
    def alike(self) -> list[tuple[int, int]]:
        """First and last position of each longest row of strategies that are not told apart: bars of the diagram."""
        k = len(self.strategies)
        if not self.differs:
            return [(0, k - 1)]
        close = self.critical_difference * (1 - 1e-12)
        ends = [max(j for j in range(i, k) if j == i or self.means[j] - self.means[i] < close) for i in range(k)]
        return [(i, end) for i, end in enumerate(ends) if end > i and (i == 0 or ends[i - 1] < end)]

    def said(self) -> str:
        """What can be told, in a sentence or two; that nothing can, where it is so."""
        k, n = len(self.strategies), len(self.streams)
        if not self.can_tell:
            return (f"Nothing can be told from {n} streams: even if all of them ranked these {k} strategies alike, "
                    f"Friedman's test would have p = {self.smallest:.2g}.")  # fmt: skip
        shown = "" if self.chi_squared is None else f"χ² = {self.chi_squared:.2f}, "
        head = f"Friedman's test over {n} streams: {shown}{show_p(self.p_value)}"
        if not self.differs:
            return f"{head}: no difference between these {k} strategies can be told."
        told = [p for p in self.pairs if p.p_holm <= ALPHA]
        alone = "; ".join(f"{p.first} from {p.second} ({show_p(p.p_holm)})" for p in told)
        if not told:
            least = min(1.0, len(self.pairs) * 2.0 ** (1 - n))
            alone = "none" + (f", and of {n} streams none can be (p ≥ {least:.2g})" if least > ALPHA else "")
        return (f"{head}. Strategies are told apart whose mean ranks lie {self.critical_difference:.2f} apart or more "
                f"(Nemenyi, 0.05). Pair by pair (Wilcoxon, Holm): {alone}.")  # fmt: skip


def rankings(streams: Sequence[Sequence[Group]]) -> list[Ranking]:
    """A ranking for each primary metric that two or more streams share, test and validation data apart."""
    kinds: dict[tuple[str, bool], list[Sequence[Group]]] = {}
    for groups in streams:
        validation = evaluated_on(groups[0].runs[0]) == "valid"
        kinds.setdefault((primary_metric(groups), validation), []).append(groups)
    found = (rank(members, metric) for (metric, _), members in kinds.items())
    return [ranking for ranking in found if ranking is not None]


def rank(streams: Sequence[Sequence[Group]], metric: str) -> Ranking | None:
    """Strategies ranked by their means over seeds; None without two streams that share two strategies.

    Streams that have measured fewer than two do not compare and are not counted.

    Args:
        metric: with a better direction.
    """
    better = higher_is_better(metric)
    scored = [(groups, {g.label: mean for g in groups if (mean := g.estimate(metric).mean) is not None})
              for groups in streams]  # fmt: skip
    scored = [(groups, means) for groups, means in scored if len(means) > 1]
    shared = [label for label in scored[0][1] if all(label in means for _, means in scored)] if scored else []
    if better is None or len(scored) < 2 or len(shared) < 2:
        return None
    values = np.array([[means[label] for label in shared] for _, means in scored])  # (N, k)
    ranks = ranks_in_rows(-values if better else values)
    order = np.argsort(ranks.mean(axis=0), kind="stable")
    ranks, values, labels = ranks[:, order], values[:, order], [shared[j] for j in order]
    known = dict.fromkeys(label for _, means in scored for label in means)
    (n, k), means = ranks.shape, ranks.mean(axis=0)
    return Ranking(
        metric, evaluated_on(scored[0][0][0].runs[0]) == "valid", tuple(labels),
        tuple(groups[0].stream for groups, _ in scored), tuple(map(tuple, ranks.tolist())), tuple(means.tolist()),
        chi_squared(ranks), friedman_p(ranks), float(math.factorial(k)) ** (1 - n), critical_difference(k, n),
        tuple(_pairs(labels, values, means)), tuple(label for label in known if label not in shared),
    )  # fmt: skip


def ranks_in_rows(values: np.ndarray) -> np.ndarray:
    """Ranks within each row, the least first; equal up to rounding, ranks are shared. (N, k) → (N, k)"""
    from scipy.stats import rankdata

    return rankdata(values.round(12), axis=1)


def chi_squared(ranks: np.ndarray) -> float | None:
    """Friedman's statistic of ranks (N, k), corrected for shared ones; None where all of each row are shared."""
    n, k = ranks.shape
    spread = float((ranks**2).sum() - n * k * (k + 1) ** 2 / 4)
    return None if spread <= 0 else float((k - 1) * n**2 * ((ranks.mean(axis=0) - (k + 1) / 2) ** 2).sum() / spread)


def friedman_p(ranks: np.ndarray) -> float:
    """The share of permutations within rows of ranks (N, k) whose mean ranks differ as much.

    All are enumerated up to 10,000; beyond, 9,999 are drawn from a fixed seed, and p = (hits + 1) / 10,000.
    """
    n, k = ranks.shape
    observed = (ranks.sum(axis=0) ** 2).sum() - 1e-9
    if math.factorial(k) ** (n - 1) <= _PERMUTATIONS:  # the first row may stay: only the order within others counts
        rows = [list(itertools.permutations(row)) for row in ranks[1:].tolist()]
        sums = np.array([np.sum(rest, axis=0) + ranks[0] for rest in itertools.product(*rows)])
        return float(((sums**2).sum(axis=1) >= observed).mean())
    generator, hits, left = np.random.default_rng(0), 0, _PERMUTATIONS - 1
    while left:  # in parts, for memory
        count = min(left, max(1, 1_000_000 // ranks.size))
        drawn = generator.permuted(np.broadcast_to(ranks, (count, n, k)), axis=2).sum(axis=1)
        hits, left = hits + int(((drawn**2).sum(axis=1) >= observed).sum()), left - count
    return (hits + 1) / _PERMUTATIONS


def critical_difference(k: int, n: int) -> float:
    """Nemenyi's, of mean ranks of k strategies over n streams, at 0.05."""
    from scipy.stats import studentized_range

    return float(studentized_range.ppf(1 - ALPHA, k, math.inf)) / math.sqrt(2) * math.sqrt(k * (k + 1) / (6 * n))


def signed_rank_p(differences: np.ndarray) -> float:
    """Two-sided p-value of Wilcoxon's signed ranks; a zero difference takes a rank that counts for neither side."""
    from scipy.stats import rankdata

    values = np.asarray(differences, dtype=float).round(12)
    p = sign_flip_test((np.sign(values) * rankdata(abs(values))).tolist())
    return 1.0 if p is None else p


def _pairs(labels: Sequence[str], values: np.ndarray, means: np.ndarray) -> Iterator[Pair]:
    pairs = list(itertools.combinations(range(len(labels)), 2))
    p_values = [signed_rank_p(values[:, i] - values[:, j]) for i, j in pairs]
    for (i, j), p, corrected in zip(pairs, p_values, holm(p_values), strict=True):
        assert corrected is not None
        yield Pair(labels[i], labels[j], float(means[j] - means[i]), p, corrected)
