"""Relearn time with its censoring, the anamnesis index, linear probes and planted behaviour."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge

from clplat.metrics import relearning as r
from clplat.metrics.relearning import Index, RelearnTime

times = st.builds(RelearnTime, st.integers(0, 20), st.booleans())


def test_relearn_time_is_the_first_step_at_the_target():
    curve = [0.0, 0.5, 0.9, 0.7, 1.0]
    assert r.relearn_time(curve, 0.9, cap=10) == RelearnTime(2)
    assert r.relearn_time(curve, 0.95, cap=10) == RelearnTime(4)
    assert r.relearn_time(curve, 0.0, cap=10) == RelearnTime(0)


def test_what_is_not_reached_is_censored_and_not_a_time():
    assert r.relearn_time([0.0, 0.5, 0.9], 0.95, cap=2) == RelearnTime(2, censored=True)
    assert r.relearn_time([0.0, 0.5, 0.9], 0.9, cap=1) == RelearnTime(1, censored=True)


def test_the_index_compares_two_models():
    """And not the unlearned one with itself, which gives 1 whatever was measured."""
    assert r.anamnesis_index(RelearnTime(10), RelearnTime(5)) == Index(2.0)
    assert r.anamnesis_index(RelearnTime(5), RelearnTime(10)) == Index(0.5)


@settings(deadline=None)
@given(times, times)
def test_the_index_of_equals_is_one_and_censoring_bounds_it(a, b):
    index = r.anamnesis_index(a, b)
    if a == b and not a.censored:
        assert index == Index(1.0)
    if a.censored and b.censored:
        assert index is None
    elif index is not None and (a.censored or b.censored):
        assert index.bound == ("at least" if a.censored else "at most")
    if index is not None:
        assert math.isfinite(index.value)
        assert index.value >= 0


@pytest.mark.parametrize("width", [3, 60])  # fewer features than samples, and more: two ways to one solution
def test_probe_is_ridge_regression_on_standardised_features(width):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, width)), rng.integers(0, 3, 40) * 2
    t, u = rng.normal(size=(30, width)), rng.integers(0, 3, 30) * 2
    z = (x - x.mean(0)) / x.std(0)
    onehot = (y[:, None] == [0, 2, 4]).astype(float)
    fitted = Ridge(alpha=1e-2 * 40).fit(z, onehot)
    guess = fitted.predict((t - x.mean(0)) / x.std(0)).argmax(1) * 2
    assert r.probe_accuracy(x, y, t, u) == pytest.approx((guess == u).mean())


def test_a_probe_sees_what_a_suppressed_row_hides():
    """Accuracy 0 on a class by its bias alone; its features separate it as before."""
    rng = np.random.default_rng(1)
    y = np.repeat([0, 1], 50)
    features = np.stack([np.where(y == 1, 2.0, -2.0), rng.normal(size=100)], 1) + 0.1 * rng.normal(size=(100, 2))
    logits = features @ np.array([[-1.0, 1.0], [0.0, 0.0]]) + np.array([0.0, -1e9])
    assert (logits.argmax(1)[y == 1] == 1).mean() == 0
    assert r.probe_accuracy(features, y, features[y == 1], y[y == 1]) == 1
    constant = np.ones((4, 2))
    assert r.probe_accuracy(constant, [0, 0, 0, 1], constant, [0, 0, 0, 1]) == 0.75  # nothing to see: the larger class
    assert math.isnan(r.probe_accuracy(features, y, features[:0], y[:0]))


def test_asr_of_a_trigger_blind_model_is_its_false_positive_rate():
    rng = np.random.default_rng(2)
    labels, predictions = rng.integers(0, 5, 300), rng.integers(0, 5, 300)
    others = labels != 3
    assert r.attack_success_rate(predictions, labels, 3) == (predictions[others] == 3).mean()
    assert r.attack_success_rate(labels, labels, 3) == 0
    assert r.attack_success_rate(np.full(300, 3), labels, 3) == 1
    assert math.isnan(r.attack_success_rate([3], [3], 3))


def test_interclass_confusion():
    y = np.array([0, 0, 0, 1, 1, 2])
    assert r.interclass_confusion(y, y, 0, 1) == (0, 0)
    swapped = np.array([1, 1, 1, 0, 0, 2])
    assert r.interclass_confusion(swapped, y, 0, 1) == (1, 5)
    assert r.interclass_confusion(np.array([2, 0, 0, 1, 0, 0]), y, 0, 1) == (2 / 5, 1)
