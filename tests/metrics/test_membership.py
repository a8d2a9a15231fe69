"""Membership inference against independent computations, and against the faults of public code."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from sklearn.metrics import roc_auc_score

from clplat.metrics import membership as m

logits = arrays(np.float64, (6, 4), elements=st.floats(-8, 8))
scores = st.lists(st.floats(-5, 5, width=16), min_size=1, max_size=12)


def public_m_entropy(p, y):
    """Modified entropy as public code has it: ln p in place of ln(1 − p), the columns of all labels for each row."""
    modified = p.copy()
    modified[:, y] = 1 - p[:, y]
    return -(modified * np.log(np.maximum(p, 1e-30))).sum(axis=1)


@settings(deadline=None)
@given(logits, st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_probabilities_losses_and_entropies_equal_a_loop(z, y):
    p = m.softmax(z)
    np.testing.assert_allclose(p, torch.tensor(z).softmax(1).numpy(), atol=1e-14)
    expected = torch.nn.functional.cross_entropy(torch.tensor(z), torch.tensor(y), reduction="none").numpy()
    np.testing.assert_allclose(m.cross_entropies(z, y), expected, atol=1e-12)
    by_hand = [-(1 - row[c]) * math.log(row[c]) - sum(q * math.log1p(-q) for j, q in enumerate(row) if j != c)
               for row, c in zip(p, y, strict=True)]  # fmt: skip
    np.testing.assert_allclose(m.modified_entropies(p, y), by_hand, rtol=1e-7, atol=1e-12)
    assert (m.modified_entropies(p, y) >= 0).all()


def test_modified_entropy_does_not_depend_on_the_batch():
    """The public formula gives a sample another value in another batch; ours does not."""
    rng = np.random.default_rng(0)
    p, y = m.softmax(rng.normal(size=(8, 5))), rng.integers(0, 5, 8)
    alone = np.concatenate([m.modified_entropies(p[i : i + 1], y[i : i + 1]) for i in range(8)])
    np.testing.assert_allclose(m.modified_entropies(p, y), alone, rtol=1e-14)
    public = np.concatenate([public_m_entropy(p[i : i + 1], y[i : i + 1]) for i in range(8)])
    assert np.abs(public_m_entropy(p, y) - public).max() > 0.1
    assert np.abs(alone - public).mean() > 0.1


def test_modified_entropy_of_a_sure_prediction():
    sure = np.eye(3)
    assert m.modified_entropies(sure, [0, 1, 2]).tolist() == [0, 0, 0]
    assert (m.modified_entropies(sure, [1, 2, 0]) > 50).all()


def test_masked_classes_have_no_probability_and_a_bounded_loss():
    z = [[1.0, -np.inf], [-np.inf, -np.inf]]
    assert m.softmax(z).tolist() == [[1, 0], [0, 0]]
    assert m.cross_entropies(z, [1, 0]).tolist() == [m.MOST_NATS] * 2


@settings(deadline=None)
@given(scores, scores)
def test_auc_equals_a_count_of_pairs(a, b):
    pairs = np.mean([(x > y) + 0.5 * (x == y) for x in a for y in b])
    assert m.auc(a, b) == pytest.approx(pairs)
    assert m.auc(a, b) + m.auc(b, a) == pytest.approx(1)
    assert m.auc(a, b) == pytest.approx(roc_auc_score([1] * len(a) + [0] * len(b), a + b))


def test_auc_is_one_half_on_two_halves_of_unseen_data():
    """Within 4 standard errors of 0.5, the error being √((m + n + 1) / 12mn)."""
    losses = np.random.default_rng(1).exponential(size=1000)
    assert abs(m.loss_auc(losses[:500], losses[500:]) - 0.5) < 4 * math.sqrt(1001 / (12 * 500 * 500))


def test_members_are_those_with_the_lower_loss():
    """Not the other way round, which turns every AUC to 1 − AUC."""
    assert m.loss_auc([0.1, 0.2], [1.0, 2.0]) == 1
    assert m.loss_auc([1.0, 2.0], [0.1, 0.2]) == 0
    assert math.isnan(m.loss_auc([], [1.0]))


def test_logistic_attack_finds_members_and_nothing_in_noise():
    rng = np.random.default_rng(2)
    low, high, more = rng.exponential(0.2, 300), rng.exponential(2, 2000), rng.exponential(2, 1000)
    assert m.loss_attack_accuracy(low, high) > 0.75
    assert abs(m.loss_attack_accuracy(more, high) - 0.5) < 0.05
    assert m.loss_attack_accuracy(low, high, seed=3) == m.loss_attack_accuracy(low, high, seed=3)
    assert math.isnan(m.loss_attack_accuracy(low[:4], high))


def test_attacks_change_nothing_they_are_given():
    a, b, c = np.linspace(0, 1, 20), np.linspace(0.5, 2, 30), np.linspace(0, 2, 10)
    before = a.copy(), b.copy(), c.copy()
    m.loss_attack_accuracy(a, b)
    m.svc_membership(a, b, c)
    m.loss_auc(a, b)
    for now, then in zip((a, b, c), before, strict=True):
        np.testing.assert_array_equal(now, then)


def test_members_sorted_by_class_do_not_bias_the_attacker():
    """The first members as they come are of the easy class only; a draw holds both."""
    easy, hard = np.full(300, 0.99), np.full(300, 0.7)
    members, others = np.concatenate([easy, hard]), np.full(200, 0.3)
    target = np.full(50, 0.7)
    assert m.svc_membership(members, others, target) == 1.0
    first = m.svc_membership(members[: len(others)], others, np.full(50, 0.62))
    assert first == 0.0  # what an attacker who has seen the easy class alone would say
    assert m.svc_membership(members, others, np.full(50, 0.62)) == 1.0


def test_fewer_members_than_others_are_enough():
    assert m.svc_membership(np.linspace(0.9, 1, 10), np.linspace(0, 0.4, 500), [0.95, 0.2]) == 0.5
    assert math.isnan(m.svc_membership([0.9], [], [0.5]))


def test_empirical_epsilon():
    assert m.empirical_epsilon(0.5, 0.5, 0.0) == 0
    assert m.empirical_epsilon(0.01, 0.01, 1e-3) == pytest.approx(math.log((1 - 1e-3 - 0.01) / 0.01))
    assert m.empirical_epsilon([0.9, 0.1], [0.1, 0.9], 0.0) == 0
