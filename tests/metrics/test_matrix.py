"""Metrics of the accuracy matrix: ranges, invariances, limit cases, and the papers' sums written out."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clplat.metrics import matrix as m

ALL = [m.average_accuracy, m.forgetting, m.backward_transfer, m.forward_transfer, m.plasticity, m.stability]
RANGES = {m.average_accuracy: (0, 1), m.forgetting: (-1, 1), m.backward_transfer: (-1, 1), m.forward_transfer: (-1, 1),
          m.plasticity: (0, 1), m.stability: (0, 1)}  # fmt: skip


def matrices(least: int = 2, most: int = 6):
    sizes = st.integers(least, most)
    return sizes.flatmap(lambda e: hnp.arrays(np.float64, (e + 1, e), elements=st.floats(0, 1)))


def triangle(size: int) -> np.ndarray:
    """Which test sets are learned by which row."""
    return np.tril(np.ones((size + 1, size), dtype=bool), -1)


@settings(deadline=None)
@given(matrices())
def test_ranges(R):
    columns = range(R.shape[1])
    for f, (low, high) in RANGES.items():
        assert low - 1e-12 <= f(R, columns) <= high + 1e-12
    assert 0 <= m.average_incremental_accuracy(R, triangle(R.shape[1])) <= 1
    assert m.relative_plasticity(R, np.ones_like(R), columns) == pytest.approx(m.plasticity(R, columns))


@settings(deadline=None)
@given(matrices())
def test_equal_to_the_sums_of_the_papers(R):
    """Tasks counted from 1, a[l][j] as the papers write it."""
    T = R.shape[1]
    a = {(i, j): R[i, j - 1] for i in range(T + 1) for j in range(1, T + 1)}
    columns = range(T)
    assert m.average_accuracy(R, columns) == pytest.approx(sum(a[T, i] for i in range(1, T + 1)) / T)
    bwt = sum(a[T, i] - a[i, i] for i in range(1, T)) / (T - 1)
    assert m.backward_transfer(R, columns) == pytest.approx(bwt)
    fwt = sum(a[i - 1, i] - a[0, i] for i in range(2, T + 1)) / (T - 1)
    assert m.forward_transfer(R, columns) == pytest.approx(fwt)
    drops = [max(a[k, j] for k in range(1, T)) - a[T, j] for j in range(1, T)]
    assert m.forgetting(R, columns) == pytest.approx(sum(drops) / (T - 1))
    assert m.plasticity(R, columns) == pytest.approx(sum(a[i, i] for i in range(1, T + 1)) / T)
    pairs = sum(a[i, j] - a[j, j] for i in range(2, T + 1) for j in range(1, i)) / (T * (T - 1) / 2)
    assert m.stability(R, columns) == pytest.approx(1 - abs(min(pairs, 0)))
    steps = [sum(a[i, j] for j in range(1, i + 1)) / i for i in range(1, T + 1)]
    assert m.average_incremental_accuracy(R, triangle(T)) == pytest.approx(sum(steps) / T)


@settings(deadline=None)
@given(matrices(), st.floats(0, 0.5))
def test_relations(R, share):
    T, columns = R.shape[1], range(R.shape[1])
    assert m.forgetting(R, columns) >= -m.backward_transfer(R, columns) - 1e-12
    # The order in which the columns are named changes nothing, and differences scale with the accuracies.
    for f in ALL:
        assert f(R, columns) == pytest.approx(f(R, list(reversed(columns))))
    for f in (m.forgetting, m.backward_transfer, m.forward_transfer):
        assert f(R * share, columns) == pytest.approx(f(R, columns) * share, abs=1e-12)
        assert f(R * 0.5 + share, columns) == pytest.approx(f(R, columns) * 0.5, abs=1e-12)
    # What was never learned by a row does not reach the metrics of the past.
    changed = R.copy()
    changed[np.triu_indices(T + 1, 0, T)] = 0.0
    for f in (m.average_accuracy, m.backward_transfer, m.plasticity, m.stability):
        assert f(changed, columns) == f(R, columns)


@settings(deadline=None)
@given(hnp.arrays(np.float64, 4, elements=st.floats(0.01, 1)))
def test_limits(learned):
    """A learner that keeps everything, and one that loses everything."""
    keeps = np.where(triangle(4), learned, 0.0)
    assert m.forgetting(keeps, range(4)) == 0
    assert m.stability(keeps, range(4)) == 1
    assert m.average_accuracy(keeps, range(4)) == m.plasticity(keeps, range(4))
    loses = np.zeros((5, 4))
    loses[np.arange(1, 5), np.arange(4)] = learned
    assert m.forgetting(loses, range(4)) == pytest.approx(learned[:3].mean())
    assert m.backward_transfer(loses, range(4)) == pytest.approx(-learned[:3].mean())
    assert m.average_accuracy(loses, range(4)) == pytest.approx(learned[3] / 4)
    assert m.stability(np.where(loses > 0, 1.0, 0.0), range(4)) == 0


def test_forgetting_sees_a_peak_after_learning():
    R = np.array([[0.0, 0, 0], [0.5, 0, 0], [0.9, 0.5, 0], [0.5, 0.5, 0.5]])
    assert m.forgetting(R, [0, 1, 2]) == pytest.approx(0.2)
    assert m.backward_transfer(R, [0, 1, 2]) == 0


def test_an_experience_of_another_kind_costs_what_was_learned():
    """Learn, then adapt: the row after the adaptation counts, its own column does not."""
    R = np.array([[0.1, 0.1], [0.9, 0.3], [0.6, 0.8]])
    assert m.average_accuracy(R, [0]) == pytest.approx(0.6)
    assert m.forgetting(R, [0]) == pytest.approx(0.3)


@settings(deadline=None)
@given(matrices(), matrices())
def test_references(R, S):
    columns = range(min(R.shape[1], S.shape[1]))
    assert m.intransigence(R, S, columns) == pytest.approx(-m.intransigence(S, R, columns))
    assert -1 <= m.intransigence(R, S, columns) <= 1
    assert m.intransigence(R, R, columns) == 0
    if m.plasticity(R, columns) > 0:
        assert m.relative_plasticity(R, R, columns) == 1
    assert math.isnan(m.relative_plasticity(R, np.zeros_like(R), columns))


@pytest.mark.parametrize("f", ALL)
def test_what_is_missing_is_never_skipped(f):
    R = np.full((4, 3), 0.5)
    assert math.isnan(f(R, []))
    for cell in [(3, 0), (1, 0), (1, 1)]:  # final, just learned, just before learning
        holed = R.copy()
        holed[cell] = np.nan
        needed = {m.average_accuracy: [(3, 0)], m.plasticity: [(1, 0)], m.forward_transfer: [(1, 1)]}
        assert math.isnan(f(holed, [0, 1, 2])) == (cell in needed.get(f, [(3, 0), (1, 0)]))


def test_no_past_yet():
    R = np.array([[0.1, 0.1], [0.9, 0.2]])
    for f in (m.forgetting, m.backward_transfer, m.stability, m.forward_transfer):
        assert math.isnan(f(R, [0]))


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(0, 2**31))
def test_transfer_average_last_as_loops(count, seed):
    R = np.random.default_rng(seed).random((count + 1, count))
    a = {(i, j): R[i, j - 1] for i in range(count + 1) for j in range(1, count + 1)}  # the papers' indices, from 1
    before = [sum(a[i, j] for i in range(1, j)) / (j - 1) for j in range(2, count + 1)]
    stages = [sum(a[i, j] for i in range(1, count + 1)) / count for j in range(1, count + 1)]
    assert m.transfer(R, range(count)) == pytest.approx(sum(before) / len(before))
    assert m.average(R, range(count)) == pytest.approx(sum(stages) / count)
    assert m.last(R, range(count)) == pytest.approx(sum(a[count, j] for j in range(1, count + 1)) / count)
    assert m.last(R, range(count)) == m.average_accuracy(R, range(count))


def test_transfer_average_last_of_a_frozen_and_of_a_constant_model():
    zero_shot = np.array([24.3, 88.4, 68.2, 44.6, 54.9, 71.0, 88.5, 59.4, 89.0, 64.7, 65.2]) / 100
    frozen = np.tile(zero_shot, (12, 1))
    columns = range(11)
    # CLIP ViT-B/16 on MTIL, as published: 69.4 in the first order, 65.4 in the second, 65.3 the other two.
    second = [9, 6, 7, 8, 5, 10, 0, 1, 3, 4, 2]
    assert m.transfer(frozen, columns) == pytest.approx(0.694, abs=1e-3)
    assert m.transfer(frozen[:, second], columns) == pytest.approx(0.654, abs=1e-3)
    assert m.average(frozen, columns) == pytest.approx(m.last(frozen, columns))
    assert m.last(frozen, columns) == pytest.approx(0.653, abs=5e-4)
    assert m.transfer(frozen, columns) == pytest.approx(zero_shot[1:].mean())
    constant = np.full((4, 3), 0.3)
    assert {round(f(constant, range(3)), 9) for f in (m.transfer, m.average, m.last)} == {0.3}
    moved = constant.copy()
    moved[[1, 2, 3], [0, 1, 2]] = 0.9  # the diagonal
    assert m.transfer(moved, range(3)) == m.transfer(constant, range(3))


def test_nothing_measured_yet_is_no_number():
    """No row at all: NaN, and no failure."""
    empty = np.empty((0, 3))
    others = (m.average_accuracy, m.backward_transfer, m.forward_transfer, m.last, m.plasticity)
    for f in (m.forgetting, m.stability, m.transfer, m.average, *others):
        assert math.isnan(f(empty, [])), f
    assert math.isnan(m.average_incremental_accuracy(empty, np.zeros((0, 3), dtype=bool)))
