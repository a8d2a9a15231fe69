"""Distances to a retrained model: limits, symmetries, independent values, and the faults of public code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.spatial.distance import jensenshannon

from clplat.metrics import reference as r
from clplat.metrics.membership import softmax

pairs = st.tuples(*[arrays(np.float64, (5, 4), elements=st.floats(-12, 12)).map(softmax)] * 2)


@settings(deadline=None)
@given(pairs)
def test_a_model_is_at_no_distance_from_itself(both):
    p, _ = both
    assert r.agreement(p, p) == 1
    assert r.js_divergence(p, p) == 0
    assert r.activation_distance(p, p) == 0
    assert r.zero_retrain_forgetting(p, p) == 1
    assert r.logit_difference(p, p) == 0
    assert r.parameter_distance([p], [p]) == 0
    assert r.tug_of_war([0.1, 0.5, 1.0], [0.1, 0.5, 1.0]) == 1
    assert r.average_gap({"UA": 0.3, "MIA": 0.2}, {"UA": 0.3, "MIA": 0.2}) == 0


@settings(deadline=None)
@given(pairs, st.permutations(range(4)))
def test_js_is_scipys_symmetric_bounded_and_blind_to_the_order_of_classes(both, order):
    p, q = both
    with np.errstate(invalid="ignore"):  # of nearly equal rows, SciPy takes the root of a sum just below 0
        expected = np.mean(np.nan_to_num([jensenshannon(a, b) ** 2 for a, b in zip(p, q, strict=True)]))
    js = r.js_divergence(p, q)
    assert js == pytest.approx(expected, abs=1e-9)
    assert js == pytest.approx(r.js_divergence(q, p), abs=1e-12)
    assert js == pytest.approx(r.js_divergence(p[:, order], q[:, order]), abs=1e-12)
    assert 0 <= js <= math.log(2) + 1e-12
    assert 1 - math.log(2) - 1e-12 <= r.zero_retrain_forgetting(p, q) <= 1


@pytest.mark.filterwarnings("ignore:reduction")
def test_js_is_a_mean_over_samples_and_not_over_classes():
    """`kl_div` with its default reduction gives 1 / C of it, and with its arguments reversed another number."""
    rng = np.random.default_rng(0)
    p, q = softmax(rng.normal(size=(50, 10))), softmax(3 * rng.normal(size=(50, 10)))
    middle = torch.tensor((p + q) / 2)
    public = sum(0.5 * torch.nn.functional.kl_div(torch.log(middle), torch.tensor(a)) for a in (p, q))
    turned = sum(0.5 * torch.nn.functional.kl_div(torch.log(torch.tensor(a)), middle) for a in (p, q))
    assert r.js_divergence(p, q) == pytest.approx(10 * float(public))
    assert r.js_divergence(p, q) > 4 * float(turned)
    wide = [np.concatenate([a, np.zeros((50, 30))], axis=1) for a in (p, q)]
    assert r.js_divergence(*wide) == pytest.approx(r.js_divergence(p, q))  # classes that nobody predicts


def test_opposite_models():
    p, q = np.eye(3)[[0, 1]], np.eye(3)[[1, 2]]
    assert r.js_divergence(p, q) == pytest.approx(math.log(2))
    assert r.zero_retrain_forgetting(p, q) == pytest.approx(1 - math.log(2))
    assert r.activation_distance(p, q) == pytest.approx(math.sqrt(2))
    assert r.activation_distance(p, q, order=1) == 2
    assert r.agreement(p, q) == 0
    assert r.tug_of_war([0, 1, 1], [1, 1, 1]) == 0


def test_one_measure_less_is_refused():
    with pytest.raises(ValueError, match="different measures"):
        r.average_gap({"UA": 1.0}, {"UA": 1.0, "MIA": 0.5})
    with pytest.raises(ValueError, match="zip"):
        r.tug_of_war([0.5, 0.5], [0.5, 0.5, 0.5])


def test_parameters_are_measured_in_units_of_the_retrained_model():
    """Public code divides by its first argument; here the retrained model is always the unit."""
    u, o = [np.array([2.0, 0.0]), np.array([[0.0]])], [np.array([1.0, 0.0]), np.array([[0.0]])]
    assert r.parameter_distance(u, o) == 1
    assert r.parameter_distance(o, u) == 0.5
    assert r.parameter_distance([np.ones(2)], [np.zeros(2)]) == math.inf


def test_a_class_masked_by_one_model_alone_is_infinitely_far():
    assert r.logit_difference([[0.0, -np.inf]], [[0.0, -np.inf]]) == 0
    assert r.logit_difference([[0.0, -np.inf]], [[0.0, 1.0]]) == math.inf


def test_indistinguishability_over_seeds():
    a, b, c, far = ([[x, 1 - x]] for x in (0.5, 0.55, 0.6, 0.99))
    near = r.indistinguishability([b], [a, b, c])
    off = r.indistinguishability([far], [a, b, c])
    assert near["within_spread"] == 1
    assert off["within_spread"] == 0
    assert off["relative"] > 10 > near["relative"]
    assert off["inside"] == pytest.approx(np.mean([r.js_divergence(x, y) for x, y in ((a, b), (a, c), (b, c))]))
