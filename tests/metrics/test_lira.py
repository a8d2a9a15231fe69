"""U-LiRA: likelihood ratios against scipy's densities, the design of the shadow models, what it finds and what not."""

import numpy as np
import pytest
from scipy.stats import norm

from clplat.metrics import lira
from clplat.metrics.forensics import auc_interval

RNG = np.random.default_rng(0)


def test_each_model_has_half_of_the_candidates_and_each_candidate_half_of_the_models():
    had = lira.halves(10, 6, seed=1)
    assert had.sum(axis=1).tolist() == [5] * 6
    assert had.sum(axis=0).tolist() == [3] * 10
    assert not (had == lira.halves(10, 6, seed=2)).all()
    assert lira.halves(7, 4, seed=0).sum(axis=0).tolist() == [2] * 7


def test_ratios_are_those_of_two_densities():
    had = lira.halves(9, 8, seed=0)
    values, target = RNG.normal(size=(8, 9)) + 2 * had, RNG.normal(size=9)
    expected = []
    spread = [np.sqrt(np.mean([np.var(values[side[:, i], i], ddof=1) for i in range(9)])) for side in (had, ~had)]
    for i in range(9):
        logs = [norm.logpdf(target[i], values[side[:, i], i].mean(), s)
                for side, s in zip((had, ~had), spread, strict=True)]  # fmt: skip
        expected.append(logs[0] - logs[1])
    np.testing.assert_allclose(lira.log_likelihood_ratios(target, values, had), expected, rtol=1e-10)


def test_hard_and_easy_samples_are_told_apart_where_one_threshold_for_all_is_blind():
    """What was erased lies a little above its own place; samples lie far from each other."""
    places, had = np.linspace(-30, 30, 40), lira.halves(40, 16, seed=0)
    erased = np.arange(40) % 2 == 0
    noise = 0.1 * RNG.normal(size=(17, 40))
    found = lira.u_lira(places + erased + noise[0], places + had + noise[1:], had, erased)
    assert found["auc"] == found["accuracy"] == 1
    assert (found["low"], found["high"]) == auc_interval(1.0, 20, 20)


def test_erased_are_the_positives():
    had = lira.halves(8, 4, seed=0)
    erased = np.arange(8) < 4
    shadows = np.where(had, 5.0, 0.0) + 0.01 * RNG.normal(size=(4, 8))
    assert lira.u_lira(np.where(erased, 5.0, 0.0), shadows, had, erased)["auc"] == 1
    assert lira.u_lira(np.where(erased, 0.0, 5.0), shadows, had, erased)["auc"] == 0


def test_confidences_that_are_all_equal_tell_nothing():
    had, erased = lira.halves(8, 4, seed=0), np.arange(8) < 4
    found = lira.u_lira(np.full(8, -87.0), np.full((4, 8), -87.0), had, erased)
    assert found["auc"] == pytest.approx(0.5)
