"""Aggregates over runs and tasks, against their definitions worked out another way."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from clplat.metrics.aggregate import (
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)

SCORES = np.random.default_rng(0).normal(size=(7, 3))
OTHERS = np.round(np.random.default_rng(1).normal(size=(5, 3)) + 0.3, 1)


def test_interquartile_mean_is_scipys_trimmed_mean() -> None:
    assert interquartile_mean(SCORES) == pytest.approx(stats.trim_mean(SCORES, 0.25, axis=None))


def test_interquartile_mean_ignores_outliers() -> None:
    spoilt = SCORES.copy()
    spoilt[SCORES.argmax() // 3, SCORES.argmax() % 3] = 1e9
    assert interquartile_mean(spoilt) == interquartile_mean(SCORES)


def test_probability_of_improvement_is_the_mann_whitney_statistic_of_each_task() -> None:
    expected = [stats.mannwhitneyu(SCORES[:, t], OTHERS[:, t]).statistic / (7 * 5) for t in range(3)]
    assert probability_of_improvement(SCORES, OTHERS) == pytest.approx(np.mean(expected))
    assert probability_of_improvement(OTHERS, SCORES) == pytest.approx(1 - np.mean(expected))
    assert probability_of_improvement(SCORES, SCORES) == 0.5


def test_profile_counts_scores_above_each_threshold() -> None:
    thresholds = [-9.0, 0.0, float(SCORES.max()), 9.0]
    expected = [1.0, float((SCORES > 0).mean()), 0.0, 0.0]
    assert performance_profile(SCORES, thresholds).tolist() == expected


def test_bootstrap_draws_runs_within_a_task() -> None:
    """Tasks far apart, runs of a task alike: whatever is drawn, each task is there as often, and nothing varies."""
    apart = np.array([[0.0, 100.0]] * 4)
    assert stratified_bootstrap(lambda s: float(s.mean()), apart) == (50.0, 50.0)
    low, high = stratified_bootstrap(interquartile_mean, SCORES, draws=300)
    assert low < interquartile_mean(SCORES) < high
