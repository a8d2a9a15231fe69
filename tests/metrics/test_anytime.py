"""Metrics while learning: against the papers' sums over every evaluation in the order of the run."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from clplat.metrics import anytime
from clplat.metrics.anytime import Evaluation
from clplat.metrics.matrix import average_accuracy


@st.composite
def runs(draw):
    size = draw(st.integers(2, 4))
    R = draw(hnp.arrays(np.float64, (size + 1, size), elements=st.floats(0, 1)))
    per = [draw(st.integers(1, 3)) for _ in range(size)]
    scores = draw(hnp.arrays(np.float64, (sum(per), size), elements=st.floats(0, 1)))
    owners = np.repeat(np.arange(size), per)
    return R, [Evaluation(k, int(e), s) for k, (e, s) in enumerate(zip(owners, scores, strict=True))]


@settings(deadline=None)
@given(runs())
def test_equal_to_the_sums_of_the_papers(run):
    R, evaluations = run
    T = R.shape[1]
    curve = []  # (experience, scores, at its end)
    for e in range(T):
        curve += [(e, v.scores, False) for v in evaluations if v.experience == e] + [(e, R[e + 1], True)]
    minima = [min(s[j] for e, s, _ in curve if e > j) for j in range(T - 1)]
    assert anytime.minimum_accuracy(R, evaluations, range(T)) == pytest.approx(sum(minima) / (T - 1))
    wc = R[T, T - 1] / T + (1 - 1 / T) * sum(minima) / (T - 1)
    assert anytime.worst_case_accuracy(R, evaluations, range(T)) == pytest.approx(wc)
    aa = [sum(s[: e + 1]) / (e + 1) for e, s, end in curve if not end]
    assert anytime.average_anytime_accuracy(evaluations, range(T)) == pytest.approx(sum(aa) / len(aa))
    gaps = [max(0, min(R[k, j], R[k + 1, j]) - min(s[j] for e, s, end in curve if e == k and not end))
            for k in range(T) for j in range(k)]  # fmt: skip
    assert anytime.stability_gap(R, evaluations, range(T)) == pytest.approx(sum(gaps) / len(gaps))


@settings(deadline=None)
@given(runs())
def test_bounds(run):
    R, evaluations = run
    columns = range(R.shape[1])
    low = anytime.worst_case_accuracy(R, evaluations, columns)
    assert 0 <= low <= average_accuracy(R, columns) + 1e-12
    assert 0 <= anytime.stability_gap(R, evaluations, columns) <= 1
    # One more evaluation never raises a minimum.
    worse = [*evaluations, Evaluation(99, R.shape[1] - 1, np.zeros(R.shape[1]))]
    assert anytime.minimum_accuracy(R, worse, columns) == 0
    assert anytime.worst_case_accuracy(R, worse, columns) <= low


def test_lasting_loss_is_no_gap():
    R = np.array([[0.0, 0], [0.9, 0], [0.2, 0.9]])
    assert anytime.stability_gap(R, [Evaluation(1, 1, np.array([0.2, 0.5]))], [0, 1]) == 0
    assert anytime.stability_gap(R, [Evaluation(1, 1, np.array([0.1, 0.5]))], [0, 1]) == pytest.approx(0.1)


def test_the_own_experience_does_not_count_as_past():
    R = np.array([[0.0, 0], [0.9, 0], [0.8, 0.9]])
    assert anytime.minimum_accuracy(R, [Evaluation(1, 0, np.array([0.1, 0.1]))], [0, 1]) == pytest.approx(0.8)


def test_missing():
    R = np.array([[0.0, 0], [0.9, 0], [0.8, 0.9]])
    assert math.isnan(anytime.average_anytime_accuracy([], [0, 1]))
    assert math.isnan(anytime.stability_gap(R, [], [0, 1]))
    assert math.isnan(anytime.minimum_accuracy(R[:2], [], [0]))
    holed = [Evaluation(1, 1, np.array([np.nan, 0.5]))]
    for f in (anytime.minimum_accuracy, anytime.worst_case_accuracy, anytime.stability_gap):
        assert math.isnan(f(R, holed, [0, 1]))
