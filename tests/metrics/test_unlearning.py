"""Metrics of erasure against counts of single samples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from clplat.metrics import unlearning as u
from clplat.metrics.unlearning import Request

HALF = np.array([[0.1, 0.1], [0.9, 0.8], [0.45, 0.0]])  # learn 100 samples, then erase 50 of them


@st.composite
def erasures(draw):
    """Learned test sets, requests that take samples of them, and right or wrong for each sample after all of it."""
    sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=3))
    owner = np.repeat(np.arange(len(sizes)), sizes)
    right = np.array(draw(st.lists(st.booleans(), min_size=len(owner), max_size=len(owner))))
    request = np.array(draw(st.lists(st.sampled_from([-1, -1, 0, 1]), min_size=len(owner), max_size=len(owner))))
    row = [right[owner == j].mean() for j in range(len(sizes))]
    requests = []
    for r in (0, 1):
        mine = request == r
        counts = {j: int((mine & (owner == j)).sum()) for j in range(len(sizes)) if (mine & (owner == j)).any()}
        row.append(right[mine].mean() if mine.any() else np.nan)
        requests.append(Request(len(sizes) + r, int(mine.sum()), counts))
    return np.array(row), requests, dict(enumerate(sizes)), owner, right, request


@settings(deadline=None)
@given(erasures())
def test_kept_accuracy_counts_single_samples(case):
    row, requests, sizes, owner, right, request = case
    kept = u.kept_accuracy(row, requests, sizes)
    left = request < 0
    touched = [j for j in sizes if ((owner == j) & ~left).any()]
    for j in sizes:
        if not ((owner == j) & left).any():
            assert j not in kept
        elif j not in touched:
            assert kept[j] == row[j]
        else:
            assert kept[j] == pytest.approx(right[np.isin(owner, touched) & left].mean())


@settings(deadline=None)
@given(erasures())
def test_retain_accuracy_counts_single_samples(case):
    """The same predictions after both requests: the first leaves all but its own samples, the second fewer."""
    row, requests, sizes, _owner, right, request = case
    R = np.tile(row, (len(row) + 1, 1))
    got = u.retain_accuracy(R, requests, sizes)
    if not (request < 0).any():
        assert math.isnan(got)
    else:
        assert got == pytest.approx((right[request != 0].mean() + right[request < 0].mean()) / 2)
        assert 0 <= got <= 1


def test_by_hand():
    one = [Request(1, 50, {0: 50})]
    assert u.forget_accuracy(HALF, one) == 0
    assert u.retain_accuracy(HALF, one, {0: 100}) == pytest.approx(0.9)
    assert u.forget_drop(HALF, one, [1]) == pytest.approx(0.8)
    assert u.h_mean(HALF, one, {0: 100}, [1]) == pytest.approx(2 * 0.9 * 0.8 / 1.7)


def test_what_is_learned_later_is_not_retained_yet():
    R = np.array([[0, 0, 0], [0.9, 0.8, 0.1], [0.45, 0.0, 0.1], [0.4, 0.0, 0.9]])
    assert u.retain_accuracy(R, [Request(1, 50, {0: 50})], {0: 100, 2: 100}) == pytest.approx(0.9)


def test_published_h_mean():
    """H of (62.13, 72.49) is 66.91, as the tables of GS-LoRA have it."""
    R = np.array([[0, 0], [0, 0.7249], [0.6213, 0.0]])
    assert u.h_mean(R, [Request(1, 10, {})], {0: 10}, [1]) == pytest.approx(0.6691, abs=5e-5)


@settings(deadline=None)
@given(st.floats(0, 1), st.floats(0, 1))
def test_h_mean_limits(kept, drop):
    R = np.array([[0, 0], [0, drop], [kept, 0.0]])
    h = u.h_mean(R, [Request(1, 10, {})], {0: 10}, [1])
    swapped = np.array([[0, 0], [0, kept], [drop, 0.0]])
    assert h == pytest.approx(u.h_mean(swapped, [Request(1, 10, {})], {0: 10}, [1]))
    assert min(kept, drop) - 1e-12 <= h <= max(kept, drop) + 1e-12
    same = np.array([[0, 0], [0, kept], [kept, 0.0]])
    assert u.h_mean(same, [Request(1, 10, {})], {0: 10}, [1]) == pytest.approx(kept)


def test_nothing_changed_is_no_drop():
    R = np.array([[0.1, 0.1], [0.9, 0.8], [0.9, 0.8]])
    assert u.forget_drop(R, [Request(1, 10, {0: 10})], [1]) == 0
    assert u.h_mean(R, [Request(1, 10, {0: 10})], {0: 100}, [1]) == 0


def test_a_gain_on_erased_data_is_no_negative_drop():
    R = np.array([[0.1, 0.1], [0.9, 0.2], [0.9, 0.8]])
    assert u.forget_drop(R, [Request(1, 10, {})], [1]) == 0


def test_the_drop_is_from_before_the_sequence_of_requests():
    """Learn, forget, forget, learn, forget: the last request starts a sequence of its own."""
    R = np.zeros((6, 5))
    R[1, [1, 2]], R[2, 2], R[4, 4] = 1.0, 0.4, 0.6
    requests = [Request(j, 1, {}) for j in (1, 2, 4)]
    assert u.forget_drop(R, requests, [1, 2, 4]) == pytest.approx((1.0 + 1.0 + 0.6) / 3)


def test_relapse():
    R = np.array([[0, 0, 0], [0.9, 0.8, 0], [0.9, 0.1, 0], [0.9, 0.4, 0.9]])
    assert u.relapse(R, [Request(1, 1, {})]) == pytest.approx(0.3)
    assert math.isnan(u.relapse(R[:3], [Request(1, 1, {})]))


@pytest.mark.parametrize(
    ("request_", "why"), [(Request(1, 50, {0: 40}), "half in"), (Request(1, 100, {0: 100}), "nothing left")]
)
def test_what_cannot_be_told_is_nan(request_, why):
    assert math.isnan(u.retain_accuracy(HALF, [request_], {0: 100})), why


def test_counts_that_contradict_the_accuracies_are_nan():
    R = np.array([[0.1, 0.1], [0.9, 0.8], [0.2, 1.0]])  # more hits on the part than on the whole
    assert math.isnan(u.retain_accuracy(R, [Request(1, 50, {0: 50})], {0: 100}))


def test_relapse_ends_where_the_class_is_taught_again():
    R = np.array([[0, 0, 0], [0.9, 0.8, 0], [0.9, 0.1, 0], [0.9, 0.9, 0.9]])
    assert u.relapse(R, [Request(1, 1, {})]) == pytest.approx(0.8)
    assert math.isnan(u.relapse(R, [Request(1, 1, {}, taught_again=2)]))
    longer = np.insert(R, 3, [0.9, 0.3, 0], axis=0)
    assert u.relapse(longer, [Request(1, 1, {}, taught_again=3)]) == pytest.approx(0.2)


def test_h_step_starts_at_the_request_and_h_mean_at_the_sequence():
    """The first request has already taken what the second erases: H credits the second, H_step does not."""
    R = np.zeros((4, 3))
    R[1:] = [[1.0, 1.0, 1.0], [0.5, 0.0, 0.0], [0.5, 0.0, 0.0]]
    requests, sizes = [Request(1, 10, {}), Request(2, 10, {})], {0: 10}
    assert u.h_mean(R, requests, sizes, [1, 2]) == pytest.approx(2 * 0.5 * 1 / 1.5)
    assert u.h_step(R, requests, sizes) == pytest.approx((2 * 0.5 * 1 / 1.5 + 0) / 2)


@settings(deadline=None)
@given(erasures())
def test_retention_loss_is_over_what_is_left(case):
    """All right before the second request: what is lost by it are the errors after, over what it leaves."""
    row, requests, sizes, owner, right, request = case
    R = np.ones((len(row) + 1, len(row)))
    R[-1] = row
    got = u.retention_loss(R, requests[1:], sizes) if not requests[0].samples else None
    left = request < 0
    if got is None or not left.any():
        return
    touched = [j for j in sizes if ((owner == j) & ~left).any()]
    lost = [1 - right[left & (np.isin(owner, touched) if j in touched else owner == j)].mean()
            for j in sizes if (left & (owner == j)).any()]  # fmt: skip
    assert got == pytest.approx(np.mean(lost))


def test_no_change_costs_nothing():
    R = np.array([[0.1, 0.1], [0.9, 0.8], [0.9, 0.8]])
    assert u.retention_loss(R, [Request(1, 50, {0: 50})], {0: 100}) == 0
    assert u.h_step(R, [Request(1, 10, {0: 10})], {0: 100}) == 0


def test_terms_of_single_requests_average_to_the_metrics():
    R = np.array([[0.1] * 3, [0.9, 0.8, 0.7], [0.6, 0.1, 0.3], [0.5, 0.2, 0.2]])
    requests, sizes, finished = [Request(1, 20, {0: 20}), Request(2, 30, {0: 30})], {0: 100}, [1, 2]
    terms = u.per_request(R, requests, sizes, finished)
    for name, whole in [("forget_accuracy", u.forget_accuracy(R, requests)), ("h_step", u.h_step(R, requests, sizes)),
                        ("retain_accuracy", u.retain_accuracy(R, requests, sizes)),
                        ("forget_drop", u.forget_drop(R, requests, finished)),
                        ("h_mean", u.h_mean(R, requests, sizes, finished)),
                        ("retention_loss", u.retention_loss(R, requests, sizes))]:  # fmt: skip
        assert whole == pytest.approx(np.mean([t[name] for t in terms])), name
    assert terms[0]["relapse"] == pytest.approx(0.1)
