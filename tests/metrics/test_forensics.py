"""Which samples were erased, from the unlearned model alone: the rule, its honest half, and the interval."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from clplat.metrics import forensics as f
from clplat.metrics import membership as m

RNG = np.random.default_rng(0)


def drawn(n, shift=0.0, classes=4, rng=RNG):
    """Logits (n, C) and labels; `shift` is added to the own class'."""
    labels = rng.integers(0, classes, n)
    logits = rng.normal(size=(n, classes))
    logits[np.arange(n), labels] += shift
    return logits, labels


@settings(deadline=None, max_examples=30)
@given(st.floats(-6, 6), st.integers(0, 3))
def test_logit_scaled_confidence_is_the_log_odds_of_the_own_class(shift, seed):
    logits, labels = drawn(8, shift, rng=np.random.default_rng(seed))
    p = torch.tensor(logits).softmax(1)[torch.arange(8), torch.tensor(labels)]
    np.testing.assert_allclose(m.logit_confidences(logits, labels), torch.logit(p).numpy(), rtol=1e-9, atol=1e-9)


def test_a_sure_prediction_keeps_its_log_odds_and_a_masked_class_a_bound():
    """ln p − ln(1 − p) of p rounded to 1 would be infinite."""
    assert m.logit_confidences([[50.0, 0.0]], [0]).tolist() == [50]
    assert m.logit_confidences([[1.0, -np.inf], [1.0, -np.inf], [-np.inf, -np.inf]], [0, 1, 0]).tolist() == [
        87,
        -87,
        -87,
    ]


def test_outputs_equal_a_loop():
    logits, labels = drawn(9, 1.0)
    p = torch.tensor(logits).softmax(1)
    expected = [[math.log(row[y] / (1 - row[y])), math.log(row[y] / (1 - row[y])) ** 2,
                 -sum(q * math.log(q) for q in row), sorted(row)[-1] - sorted(row)[-2]]
                for row, y in zip(p.tolist(), labels, strict=True)]  # fmt: skip
    np.testing.assert_allclose(f.outputs(logits, labels), expected, rtol=1e-9)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 400), st.integers(2, 40), st.integers(2, 40))
def test_the_ends_of_an_interval_lie_z_standard_errors_from_the_auc(steps, a, b):
    auc, z = steps / 400, 1.959964
    low, high = f.auc_interval(auc, a, b)
    assert 0 <= low <= auc <= high <= 1
    for end in {low, high} - {0.0, 1.0}:
        n = (a + b) / 2
        variance = end * (1 - end) * (1 + (n - 1) * ((1 - end) / (2 - end) + end / (1 + end))) / (a * b)
        assert abs(auc - end) == pytest.approx(z * math.sqrt(variance), rel=1e-6)
    mirrored = f.auc_interval(1 - auc, a, b)
    np.testing.assert_allclose(mirrored, (1 - high, 1 - low), atol=1e-9)


def test_an_auc_of_one_has_an_interval():
    low, high = f.auc_interval(1.0, 12, 12)
    assert high == 1
    assert low < 1


def test_a_rule_is_tested_on_the_half_that_it_did_not_learn_from():
    """The same AUC by hand; on samples that it has learned, noise of many features would be told apart."""
    a, b = np.random.default_rng(1).normal(size=(30, 12)), np.random.default_rng(2).normal(size=(41, 12))
    found, rng = f.told_apart(a, b, seed=3), np.random.default_rng(3)
    a, b = rng.permutation(a), rng.permutation(b)
    learn, truth = np.concatenate([a[:15], b[:21]]), np.repeat([1, 0], [15, 21])
    middle, spread = learn.mean(0), learn.std(0)
    rule = LogisticRegression(class_weight="balanced", max_iter=1000).fit((learn - middle) / spread, truth)
    scores = rule.decision_function((np.concatenate([a[15:], b[21:]]) - middle) / spread)
    assert found["auc"] == pytest.approx(roc_auc_score(np.repeat([1, 0], [15, 20]), scores))
    assert found["tested"] == [15, 20]
    assert (found["low"], found["high"]) == f.auc_interval(found["auc"], 15, 20)
    assert roc_auc_score(truth, rule.decision_function((learn - middle) / spread)) != found["auc"]


def test_too_few_to_learn_from_are_told_so():
    assert f.told_apart(np.zeros((9, 1)), np.ones((50, 1))) is None


def scores(**sets):
    return {f"{name}.{k}": v for name, pair in sets.items() for k, v in zip(("logits", "labels"), pair, strict=True)}


def test_forgetting_too_much_gives_away_as_forgetting_too_little_does():
    """Whichever side of the unseen samples the erased ones lie on."""
    for shift in (-9.0, 9.0):
        found = f.which_were_erased(
            scores(erased=drawn(40, shift), retained=drawn(60, 0.0), retained_test=drawn(60, 0.0))
        )
        assert found["forensic_unseen"]["auc"] == found["forensic_retained"]["auc"] == 1


def test_candidates_are_of_the_classes_that_were_erased():
    erased = drawn(30, classes=2)
    kept, test = drawn(50, classes=4), drawn(70, classes=4)
    pad = np.concatenate([erased[0], np.zeros((30, 2))], 1), erased[1]
    found = f.which_were_erased(scores(erased=pad, retained=kept, retained_test=test))
    assert found["forensic_retained"]["tested"] == [15, (kept[1] < 2).sum() // 2]
    assert found["forensic_unseen"]["tested"] == [15, (test[1] < 2).sum() // 2]
    assert found["forensic_retained"]["of"] == "retained samples of the same classes"
    others = kept[0], kept[1] % 2 + 2
    found = f.which_were_erased(scores(erased=pad, retained=others, erased_test=(test[0], test[1] % 2)))
    assert found["forensic_retained"]["of"] == "retained samples, all of other classes"
    assert found["forensic_unseen"]["tested"] == [15, 35]
    assert found["forensic_unseen"]["of"] == "held-out samples that go with them"


def test_what_was_not_scored_is_no_number():
    assert f.which_were_erased({}) == {"forensic_unseen": None, "forensic_retained": None}
    assert f.which_were_erased(scores(erased=drawn(40)))["forensic_unseen"] is None
