"""Ranks over streams: Friedman, Nemenyi and Wilcoxon against scipy and hand-computed cases."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from scipy import stats

from clplat.report.compare import Group, split_streams
from clplat.report.plots import draw
from clplat.report.ranked import diagram
from clplat.report.ranks import chi_squared, critical_difference, friedman_p, rank, rankings, signed_rank_p
from clplat.report.standalone import standalone

NAMES = ("joint", "er", "naive")


def streams(rows: list[list[float | None]], metric: str = "average_accuracy", names: Any = NAMES, **loop: Any):
    """A stream for each row, with a run of each strategy that has a value."""
    runs = [
        {"strategy": name, "stream": f"stream {i}", "backbone": "mlp", "seed": 0, "status": "complete",
         "experiences": [], "metrics": {metric: value},
         "config": {"strategy": {"name": name}, "stream": {"name": f"stream {i}"}, "loop": loop}}
        for i, row in enumerate(rows) for name, value in zip(names, row, strict=True) if value is not None
    ]  # fmt: skip
    return split_streams(runs)


def test_friedman_and_its_ties_are_scipys() -> None:
    for seed in range(5):
        values = np.random.default_rng(seed).integers(0, 6, size=(7, 4))
        ranks = stats.rankdata(values, axis=1)
        assert chi_squared(ranks) == pytest.approx(stats.friedmanchisquare(*values.T).statistic)
    assert chi_squared(np.full((3, 2), 1.5)) is None


def test_demsars_own_example() -> None:
    """C4.5 and three variants on 14 data sets, Demšar (2006), section 3.2.2: from its mean ranks."""
    k, n, means = 4, 14, np.array([3.143, 2.000, 2.893, 1.964])
    printed = 12 * n / (k * (k + 1)) * ((means**2).sum() - k * (k + 1) ** 2 / 4)
    assert printed == pytest.approx(9.28, abs=0.01)
    assert critical_difference(4, 14) == pytest.approx(1.25, abs=0.005)
    assert critical_difference(2, 14) == pytest.approx(stats.norm.ppf(0.975) / math.sqrt(14))  # k = 2: a normal test


@pytest.mark.parametrize(("n", "k"), [(3, 3), (4, 2)])
def test_the_p_value_is_the_share_of_all_permutations(n: int, k: int) -> None:
    ranks = np.array([np.random.default_rng([n, i]).permutation(k) + 1.0 for i in range(n)])
    rows = itertools.product(list(itertools.permutations(range(1, k + 1))), repeat=n)
    found = [chi_squared(np.array(rows_, dtype=float)) for rows_ in rows]
    observed = chi_squared(ranks)
    assert observed is not None
    assert friedman_p(ranks) == pytest.approx(np.mean([x >= observed - 1e-9 for x in found if x is not None]))


def test_drawn_permutations_are_near_the_f_distribution_of_many_streams() -> None:
    ranks = np.array([np.random.default_rng([5, i]).permutation(5) + 1.0 for i in range(40)])
    n, k = ranks.shape
    chi = chi_squared(ranks)
    assert chi is not None
    f = (n - 1) * chi / (n * (k - 1) - chi)
    expected = stats.f.sf(f, k - 1, (k - 1) * (n - 1))
    assert friedman_p(ranks) == pytest.approx(expected, abs=5 * math.sqrt(0.25 / 10_000))


def test_signed_ranks_are_scipys() -> None:
    values = np.random.default_rng(0).normal(0.4, 1, size=9)
    assert signed_rank_p(values) == pytest.approx(stats.wilcoxon(values, method="exact").pvalue)
    assert signed_rank_p(np.zeros(4)) == 1


def test_few_streams_say_that_nothing_can_be_told() -> None:
    ranking = rank(streams([[0.9, 0.6, 0.2]] * 2), "average_accuracy")
    assert ranking is not None
    assert ranking.means == (1, 2, 3)
    assert ranking.strategies == NAMES
    assert ranking.smallest == ranking.p_value == pytest.approx(1 / 6)
    assert not ranking.differs
    assert ranking.alike == [(0, 2)]
    assert "Nothing can be told from 2 streams" in ranking.said()


def test_what_is_told_apart_and_what_is_joined() -> None:
    ranking = rank(streams([[0.9, 0.6, 0.2]] * 5), "average_accuracy")
    assert ranking is not None
    assert ranking.differs
    assert ranking.p_value == pytest.approx(6**-4)
    assert ranking.critical_difference == pytest.approx(1.482, abs=1e-3)
    assert ranking.alike == [(0, 1), (1, 2)], "neighbours lie 1 apart, the ends 2"
    assert "none can be (p ≥ 0.19)" in ranking.said()  # three pairs, each p ≥ 2 / 2^5
    assert {p.p_holm for p in ranking.pairs} == {3 * 2 / 2**5}
    mixed = rank(streams([[0.9, 0.6, 0.2], [0.2, 0.9, 0.6], [0.6, 0.2, 0.9]] * 2), "average_accuracy")
    assert mixed is not None
    assert mixed.p_value == 1
    assert "no difference between" in mixed.said()


def test_equal_means_share_a_rank_and_smaller_may_be_better() -> None:
    ranking = rank(streams([[0.1 + 0.2, 0.3, 0.5]] * 3, "online_error"), "online_error")
    assert ranking is not None
    assert ranking.ranks[0] == (1.5, 1.5, 3)
    assert rank(streams([[0.1, 0.2, 0.3]] * 3, "weight_norm"), "weight_norm") is None  # neither is better


def test_strategies_and_streams_that_do_not_compare_are_named_or_left_out() -> None:
    ranking = rank(streams([[0.9, 0.6, None], [0.8, 0.5, 0.1], [None, 0.5, None]]), "average_accuracy")
    assert ranking is not None
    assert (ranking.strategies, ranking.left_out, len(ranking.streams)) == (("joint", "er"), ("naive",), 2)
    assert rank(streams([[0.9, 0.6, 0.1]]), "average_accuracy") is None


def test_validation_data_and_test_data_are_ranked_apart() -> None:
    tested: list[list[Group]] = streams([[0.9, 0.6, 0.2]] * 2)
    validated = streams([[0.2, 0.6, 0.9]] * 2, evaluate_on="valid")
    assert [(r.validation, r.strategies[0]) for r in rankings([*tested, *validated])] == [
        (False, "joint"),
        (True, "naive"),
    ]


def test_the_diagram_joins_what_is_alike_and_few_streams_have_none() -> None:
    few = rank(streams([[0.9, 0.6, 0.2]] * 2), "average_accuracy")
    many = rank(streams([[0.9, 0.6, 0.2]] * 5), "average_accuracy")
    assert few is not None
    assert many is not None
    assert diagram(few, 0) is None
    figure = diagram(many, 0)
    assert figure is not None
    drawn = standalone(figure)
    assert drawn.count('class="join"') == 2
    assert all(f"{name} {mean}.00" in drawn for mean, name in enumerate(NAMES, 1))
    assert "CD 1.48" in drawn
    files = draw(figure)
    assert files["png"].startswith(b"\x89PNG")
    assert files["pdf"].startswith(b"%PDF-")
    assert b"/Type3" not in files["pdf"]
