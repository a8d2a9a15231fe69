"""Ridge regression forgets: erasing is never having learned, for one request and for any sequence."""

import copy
import itertools

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ridges import WAYS, C, D, N, data, learner, off, reference, without


@pytest.mark.parametrize("bits", [14, None])
@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize("size", [1, 3, 20])  # d / 8 = 3: up to there through the inverse
def test_forgetting_is_never_having_learned(options, bits, size):
    x, y = data(bits=bits)
    rows = torch.arange(5, 5 + size)
    ridge, kept = learner(x, y, bits=bits, **options), without(y, rows)
    ridge.remove(x[rows], y[rows])
    never = learner(x[kept], y[kept], bits=bits, **options)
    assert off(ridge.weight, reference(x[kept], y[kept])) < 1e-9
    assert torch.equal(ridge.counts, never.counts)
    if bits is not None:
        assert torch.equal(ridge.gram.tril(), never.gram.tril())
        assert torch.equal(ridge.cross, never.cross)
        assert torch.equal(ridge.class_grams.tril(), never.class_grams.tril())
    if options.get("inverse"):
        assert (ridge.inverse - never.inverse).norm() < 1e-9 * never.inverse.norm()


@pytest.mark.parametrize("options", WAYS)
def test_erased_and_learned_again_is_as_before(options):
    x, y = data()
    ridge, before = learner(x, y, bits=14, **options), learner(x, y, bits=14, **options)
    ridge.remove(x[:3], y[:3])
    assert off(ridge.weight, before.weight) > 1e-6
    ridge.add(x[:3], y[:3])
    ridge.close()
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(ridge.state_dict()[name], tensor, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("options", WAYS)
def test_requests_in_either_order_or_as_one(options):
    x, y = data()
    one, two, both = torch.arange(0, 3), torch.arange(3, 5), torch.arange(0, 5)
    ends = []
    for requests in ((one, two), (two, one), (both,)):
        ridge = learner(x, y, bits=14, **options)
        for rows in requests:
            ridge.remove(x[rows], y[rows])
        ends.append(ridge)
    for a, b in itertools.pairwise(ends):
        assert torch.equal(a.gram.tril(), b.gram.tril())
        assert off(a.weight, b.weight) < 1e-11


@pytest.mark.parametrize("bits", [14, None])
@pytest.mark.parametrize("options", WAYS)
def test_erasing_everything_leaves_nothing(options, bits):
    x, y = data(bits=bits)
    ridge = learner(x, y, bits=bits, **options)
    for rows in torch.arange(N).split(13):
        ridge.remove(x[rows], y[rows])
    for tensor in (ridge.gram.tril(), ridge.cross, ridge.weight, ridge.counts, ridge.class_grams.tril()):
        assert not tensor.any()
    assert ridge(x).isneginf().all()


@pytest.mark.parametrize("options", WAYS)
def test_erasing_a_class_is_a_head_trained_without_it(options):
    x, y = data()
    rows = (y == 2).nonzero()[:, 0]
    ridge = learner(x, y, bits=14, **options)
    if options.get("per_class"):  # no data at all
        ridge.remove(x[:0], y[:0], (2,))
    else:
        ridge.remove(x[rows], y[rows])
    kept = without(y, rows)
    assert not ridge.weight[:, 2].any()
    assert not ridge.cross[:, 2].any()
    assert ridge(x)[:, 2].isneginf().all()
    assert off(ridge.weight, reference(x[kept], y[kept])) < 1e-11
    never = learner(x[kept], y[kept], bits=14, **options)
    assert torch.equal(ridge.gram.tril(), never.gram.tril())
    assert torch.equal(ridge(x), never(x)) or off(ridge(x)[:, :2], never(x)[:, :2]) < 1e-12


def test_classes_by_statistics_and_samples_by_data_in_one_request():
    x, y = data()
    rows = torch.cat([(y == 2).nonzero()[:, 0], (y == 0).nonzero()[:2, 0]])
    ridge, kept = learner(x, y, bits=14, per_class=True), without(y, rows)
    ridge.remove(x[rows[-2:]], y[rows[-2:]], (2,))
    never = learner(x[kept], y[kept], bits=14, per_class=True)
    for name, tensor in never.state_dict().items():
        assert torch.equal(ridge.state_dict()[name].tril() if tensor.ndim > 1 else ridge.state_dict()[name],
                           tensor.tril() if tensor.ndim > 1 else tensor), name  # fmt: skip


def test_nothing_to_erase_changes_nothing():
    x, y = data()
    for options in WAYS:
        ridge = learner(x, y, bits=14, **options)
        before = copy.deepcopy(ridge.state_dict())
        ridge.remove(x[:0], y[:0])
        assert all(torch.equal(v, before[k]) for k, v in ridge.state_dict().items())


def test_a_sample_without_residual_changes_the_inverse_and_not_the_weight():
    x, y = data()
    ridge = learner(x, y, inverse=True)
    exact = x[:2] @ ridge.weight  # labels that the head gives already
    ridge._one_hot = lambda labels: exact if len(labels) == 2 else torch.nn.functional.one_hot(labels, C).double()
    before = ridge.weight.clone(), ridge.inverse.clone()
    v = ridge.answer(x[:2], y[:2], ridge.counts)
    torch.testing.assert_close(ridge.weight, before[0], atol=1e-13, rtol=1e-12)
    ridge.settle(*v)
    assert (ridge.inverse - before[1]).abs().max() > 1e-6


def test_what_is_left_is_positive_semi_definite_and_s_is_bounded():
    x, y = data(bits=None)
    ridge, gamma = learner(x, y, inverse=True), 0.1
    rows = torch.arange(10)
    s = torch.eye(10, dtype=torch.float64) - x[rows] @ ridge.inverse @ x[rows].T
    least = gamma / (gamma + torch.linalg.matrix_norm(x[rows], 2) ** 2)
    assert torch.linalg.eigvalsh(s).min() >= least
    assert torch.linalg.eigvalsh(s).max() <= 1 + 1e-12
    ridge.remove(x[rows], y[rows])
    assert torch.linalg.eigvalsh(ridge.gram, UPLO="L").min() > -1e-10


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(
    steps=st.lists(st.tuples(st.booleans(), st.integers(1, 9), st.integers(0, 2**16)), min_size=1, max_size=12),
    options=st.sampled_from(WAYS),
    bits=st.sampled_from([14, None]),
)
def test_any_sequence_of_learning_and_erasing_ends_where_learning_what_is_left_does(steps, options, bits):
    x, y = data(bits=bits)
    ridge, held = learner(bits=bits, **options), torch.zeros(N, dtype=torch.bool)
    for learn, size, seed in steps:
        pool = (~held if learn else held).nonzero()[:, 0]
        rows = pool[torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:size]]
        if learn:
            ridge.open()
            ridge.add(x[rows], y[rows])
            ridge.close()
        else:
            ridge.remove(x[rows], y[rows])
        held[rows] = learn
    assert torch.equal(ridge.counts, torch.bincount(y[held], minlength=C))
    if not held.any():
        assert not ridge.weight.any()
        return
    assert off(ridge.weight, reference(x[held], y[held])) < 1e-9
    if bits is not None:
        assert torch.equal(ridge.gram.tril(), learner(x[held], y[held], bits=bits).gram.tril())


@pytest.mark.parametrize(
    ("n", "gamma", "offset", "options", "fast"),
    [
        (600, 0.1, 0.0, {"bits": 14, "inverse": True}, True),
        (600, 0.1, 0.0, {"bits": 14}, False),
        (600, 0.1, 0.0, {"inverse": True}, True),  # sums with rounding errors
        (150, 0.1, 0.0, {"bits": 14, "inverse": True}, True),
        (150, 1e-4, 3.0, {"bits": 14, "inverse": True}, False),  # ill-conditioned: not answered through the inverse
        (150, 1e-4, 3.0, {"bits": 14}, False),
    ],
)
def test_two_hundred_alternating_requests_stay_within_a_billionth(n, gamma, offset, options, fast):
    """Against a fresh solve on the samples held, after each request; condition below 1e10."""
    d, classes = 200, 10
    draw = torch.Generator().manual_seed(3)
    x = torch.relu(torch.randn(n, d, generator=draw, dtype=torch.float64)) + offset
    x, y = torch.round(x * 2**14) / 2**14, torch.randint(classes, (n,), generator=draw)
    ridge = learner(x, y, gamma=gamma, classes=classes, **options)
    condition = np.linalg.cond((x.T @ x).numpy() + gamma * np.eye(d))
    assert (1e9 if offset else 1e2) < condition < 1e10
    assert (len(ridge.inverse) > 0) is fast
    held, gone, worst = torch.ones(n, dtype=torch.bool), torch.arange(0), 0.0
    for number in range(200):
        if number % 2 == 0:
            rows = held.nonzero()[:, 0]
            gone = rows[torch.randperm(len(rows), generator=draw)[:20]]
            ridge.remove(x[gone], y[gone])
            held[gone] = False
        else:
            ridge.open()
            ridge.add(x[gone], y[gone])
            ridge.close()
            held[gone] = True
        fresh = learner(x[held], y[held], gamma=gamma, classes=classes, bits=options.get("bits"))
        worst = max(worst, off(ridge.weight, fresh.weight))
    assert worst < 1e-9
    if not fast:
        assert worst == 0.0  # exact sums and the same solve: bit for bit


def test_two_hundred_requests_in_a_row_through_the_inverse_stay_within_a_billionth():
    """With no learning between them, which would make the inverse anew."""
    x, y = data(n=1500, d=160, classes=10, seed=4)
    ridge = learner(x, y, classes=10, bits=14, inverse=True)
    ridge.solve = lambda: pytest.fail("the inverse was not good enough to go on with")
    for number in range(200):
        rows = torch.arange(5 * number, 5 * number + 5)
        ridge.remove(x[rows], y[rows])
    assert off(ridge.weight, reference(x[1000:], y[1000:], classes=10)) < 1e-9
    assert off(ridge.inverse, np.linalg.inv((x[1000:].T @ x[1000:]).numpy() + 0.1 * np.eye(160))) < 1e-9


def test_an_inverse_that_has_drifted_is_made_anew():
    x, y = data()
    ridge = learner(x, y, bits=14, inverse=True)
    ridge.inverse += 1e-7 * torch.eye(D, dtype=torch.float64)
    ridge.remove(x[:2], y[:2])
    assert off(ridge.weight, reference(x[2:], y[2:])) < 1e-11
    assert off(ridge.inverse, np.linalg.inv((x[2:].T @ x[2:]).numpy() + 0.1 * np.eye(D))) < 1e-11
