"""Online error, returns and the dip."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clplat.metrics.adaptation import (
    ReturnCurve,
    dip_area,
    initial_dip,
    normalized_return,
    online_error,
    recovery_fraction,
    steps_to_score,
)

returns = st.lists(st.floats(-100, 100), min_size=1, max_size=8)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.integers(20, 40)), min_size=1))
def test_online_error(counts):
    right, seen = zip(*counts, strict=True)
    error = online_error(right, seen)
    assert 0 <= error <= 1
    assert error == pytest.approx(1 - sum(r / n for r, n in counts) / len(counts))


@settings(deadline=None)
@given(returns, st.floats(-100, 100), st.floats(0.5, 4), st.floats(-10, 10))
def test_units_of_reward_change_nothing(values, before, scale, shift):
    steps = range(10, 10 * len(values) + 1, 10)
    plain = ReturnCurve(-50, 50, before, steps, values)
    other = ReturnCurve(-50 * scale + shift, 50 * scale + shift, before * scale + shift, steps,
                        [v * scale + shift for v in values])  # fmt: skip
    assert normalized_return([plain]) == pytest.approx(normalized_return([other]), abs=1e-9)
    assert initial_dip([plain]) == pytest.approx(initial_dip([other]), abs=1e-9)
    assert initial_dip([plain]) >= 0
    assert 0 <= recovery_fraction([plain]) <= 1


def test_limits():
    assert normalized_return([ReturnCurve(10, 20, None, [1], [10])]) == 0
    assert normalized_return([ReturnCurve(10, 20, None, [1], [20])]) == 1
    assert normalized_return([ReturnCurve(10, 20, None, [1], [25])]) == 1.5
    rising = ReturnCurve(0, 100, 50, [10, 20], [60, 70])
    assert (initial_dip([rising]), recovery_fraction([rising])) == (0, 0)


def test_a_late_collapse_is_no_initial_dip():
    late = ReturnCurve(0, 100, 50, [10, 20, 30, 40], [60, 70, 80, 0])
    assert (initial_dip([late]), recovery_fraction([late])) == (0, 0)


def test_recovery_is_counted_after_the_lowest_point():
    """A warm-up that holds the return at its level before the dip is no recovery."""
    warm = ReturnCurve(0, 100, 50, [10, 20, 30, 40], [50, 10, 40, 50])
    assert recovery_fraction([warm]) == 1
    assert recovery_fraction([ReturnCurve(0, 100, 50, [10, 20, 30, 40], [50, 10, 50, 20])]) == 0.75
    never = ReturnCurve(0, 100, 50, [10, 20, 30, 40], [50, 10, 20, 30])
    assert recovery_fraction([never]) == 1
    assert initial_dip([never]) == pytest.approx(0.4)


def test_no_return_on_entry():
    curve = ReturnCurve(0, 100, None, [10], [50])
    assert math.isnan(initial_dip([curve]))
    assert math.isnan(recovery_fraction([curve]))
    assert math.isnan(online_error([], []))


def test_area_of_a_dip_is_depth_times_length():
    """Down by 0.4 and back in a triangle over the whole: half of it; wider apart, the same share."""
    assert dip_area([ReturnCurve(0, 100, 80, [10, 20], [40, 80])]) == pytest.approx(0.2)
    assert dip_area([ReturnCurve(0, 100, 80, [100, 200], [40, 80])]) == pytest.approx(0.2)
    assert dip_area([ReturnCurve(0, 100, 80, [10, 20], [80, 99])]) == 0
    assert math.isnan(dip_area([ReturnCurve(0, 100, None, [10], [40])]))


def test_steps_to_a_score_are_those_of_the_first_evaluation_that_has_it():
    late = ReturnCurve(0, 100, 10, [10, 20, 30], [50, 95, 80])
    assert steps_to_score([late]) == 20
    assert steps_to_score([late, ReturnCurve(0, 100, 95, [10], [10])]) == 10
    assert math.isnan(steps_to_score([late, ReturnCurve(0, 100, 10, [10], [10])]))
