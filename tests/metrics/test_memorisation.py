"""Measures of TOFU, MUSE and open-unlearning against their definitions, written out here; limits; signs."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from clplat.metrics import memorisation as m

RNG = np.random.default_rng(0)
RIGHT, WRONG = RNG.exponential(size=7), RNG.exponential(size=(7, 3))
ids = st.lists(st.integers(0, 2), min_size=1, max_size=8)


def test_truth_ratios_are_of_probabilities_per_token():
    """Wrong over right, of the geometric mean of the wrong ones: not the other way round, not one of the losses."""
    expected = [
        math.prod(math.exp(-x) for x in row) ** (1 / 3) / math.exp(-r) for r, row in zip(RIGHT, WRONG, strict=True)
    ]
    np.testing.assert_allclose(m.truth_ratios(RIGHT, WRONG), expected, rtol=1e-12)


def test_scores_of_truth_ratios():
    ratios = [0.25, 0.5, 1.0, 2.0, 8.0]
    assert m.kept_truth(ratios) == pytest.approx((0.75 + 0.5) / 5)
    assert m.erased_truth(ratios) == pytest.approx((0.25 + 0.5 + 1 + 0.5 + 0.125) / 5)
    assert m.erased_truth([0.0]) == 0
    assert m.erased_truth(ratios) == pytest.approx(m.erased_truth([1 / r for r in ratios]))


def apart(a, b):
    """Largest distance of two empirical distribution functions."""
    return max(abs(np.mean(np.asarray(a) <= x) - np.mean(np.asarray(b) <= x)) for x in [*a, *b])


def test_forget_quality_is_the_share_of_splits_that_lie_as_far_apart():
    a, b = [0.1, 0.4, 0.5, 0.7], [0.3, 0.9, 1.2, 1.4, 2.0]
    pool, seen = a + b, apart(a, b)
    splits = [set(c) for c in itertools.combinations(range(9), 4)]
    far = [apart([pool[i] for i in c], [pool[i] for i in range(9) if i not in c]) >= seen - 1e-12 for c in splits]
    assert m.forget_quality(a, b) == pytest.approx(np.mean(far))
    assert m.forget_quality([1 / x for x in a], [1 / x for x in b]) == pytest.approx(np.mean(far))
    assert m.forget_quality(a, a) == 1


def test_probabilities():
    assert m.probability(RIGHT) == pytest.approx(sum(math.exp(-x) for x in RIGHT) / 7)
    shares = [
        math.exp(-r) / (math.exp(-r) + sum(math.exp(-x) for x in row)) for r, row in zip(RIGHT, WRONG, strict=True)
    ]
    assert m.probability_among(RIGHT, WRONG) == pytest.approx(sum(shares) / 7)


def test_utility_is_a_harmonic_mean_of_nine():
    values = RNG.uniform(0.1, 1, 9)
    assert m.model_utility(values) == pytest.approx(9 / sum(1 / v for v in values))
    assert m.model_utility([1.0] * 8 + [0.0]) == 0
    with pytest.raises(ValueError, match="nine measures, not of 3"):
        m.model_utility(values[:3])


@settings(deadline=None)
@given(st.lists(st.floats(-20, 0), min_size=1, max_size=30), st.sampled_from([0.05, 0.2, 0.4, 1.0]))
def test_min_k_is_over_the_least_likely_tokens(found, share):
    count = max(1, int(len(found) * share))
    assert m.min_k(found, share) == pytest.approx(-math.fsum(sorted(found)[:count]) / count)


def test_privacy_leakage_is_as_muse_has_it():
    """Its AUC has the erased texts for negatives and −score for the score."""
    scores = [(RNG.normal(shift, size=20), RNG.normal(size=30)) for shift in (-1.0, 0.1)]
    theirs = [roc_auc_score([0] * 20 + [1] * 30, -np.concatenate(pair)) for pair in scores]
    ours = [m.text_auc(*pair) for pair in scores]
    np.testing.assert_allclose(ours, [1 - v for v in theirs])
    assert m.privacy_leakage(*ours) == pytest.approx((theirs[0] - theirs[1]) / theirs[1] * 100)
    assert m.privacy_leakage(*ours) < 0  # erased texts are still the likelier ones: forgotten too little
    assert m.privacy_leakage(1.0, 0.5) == -100
    assert m.privacy_leakage(0.5, 1.0) is None


@given(ids.flatmap(lambda a: st.tuples(st.just(a), st.lists(st.integers(0, 2), min_size=len(a), max_size=len(a)))))
def test_extraction_strength_tries_every_prefix(pair):
    greedy, tokens = pair
    shortest = next(k for k in range(len(tokens) + 1) if greedy[k:] == tokens[k:])
    assert m.extraction_strength(greedy, tokens) == pytest.approx(1 - shortest / len(tokens))
    assert m.exact_memorisation(greedy, tokens) == pytest.approx(sum(map(int.__eq__, greedy, tokens)) / len(tokens))
    assert m.extraction_strength(tokens, tokens) == m.exact_memorisation(tokens, tokens) == 1
