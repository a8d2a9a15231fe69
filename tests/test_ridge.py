"""Ridge regression from sums, against NumPy in float64: whatever came when, what is left decides."""

import copy

import numpy as np
import pytest
import torch
from ridges import WAYS, C, D, N, data, learner, off, reference

from clplat.components.ridge import BLOCK, Ridge, add_products, times
from clplat.errors import UserError


def test_the_solution_is_that_of_the_normal_equations():
    x, y = data()
    assert off(learner(x, y).weight, reference(x, y)) < 1e-11


@pytest.mark.parametrize("bits", [14, None])
def test_any_split_order_and_growth_of_classes_is_the_joint_solution(bits):
    x, y = data(bits=bits)
    order = y.argsort(stable=True)  # class after class, each met when its first sample comes
    for pieces in (1, 7, N):
        ridge = Ridge(D, 0.1, bits=bits)
        for rows in order.tensor_split(pieces):
            ridge.grow(int(y[rows].max()) + 1)
            ridge.open()
            ridge.add(x[rows], y[rows])
            ridge.close()  # a solution after each piece, as after each experience
        assert off(ridge.weight, reference(x, y)) < 1e-9
        if bits is not None:  # sums have no rounding error: not nearly, but the same
            assert torch.equal(ridge.gram.tril(), learner(x, y, bits=bits).gram.tril())
            assert torch.equal(ridge.weight, learner(x, y, bits=bits).weight)


def test_a_class_without_a_sample_predicts_nothing():
    x, y = data()
    ridge = learner(x, y.clamp(max=2))
    ridge.grow(6)
    logits = ridge(x)
    assert logits[:, 3:].isneginf().all()
    assert logits[:, :3].isfinite().all()
    ridge.add(x, y)  # until the solution is there, a class being learned can't win either
    assert ridge(x)[:, 3:].isneginf().all()


def test_a_large_gamma_leaves_the_sums():
    x, y = data()
    ridge = learner(x, y, gamma=1e9)
    torch.testing.assert_close(1e9 * ridge.weight, ridge.cross, atol=1e-4, rtol=1e-6)


def test_gamma_is_counted_once_however_often_it_is_solved():
    x, y = data()
    ridge = learner(x, y, gamma=3.0)
    ridge.solve(), ridge.solve()
    assert off(ridge.weight, reference(x, y, 3.0)) < 1e-11
    assert off(ridge.weight, reference(x, y, 6.0)) > 1e-3


def strangers():
    x, y = data(seed=9)
    return 30 * x[:2], y[:2]


@pytest.mark.parametrize("options", WAYS)
@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (strangers, "not among those learned|raise it"),
        (lambda: (data()[0][:30], torch.zeros(30, dtype=torch.int64)), r"erases more samples of class 0 than are"),
    ],
)
def test_what_was_not_learned_is_refused_and_nothing_changes(options, request_, message):
    x, y = data()
    ridge = learner(x, y, bits=14, **options)
    before = copy.deepcopy(ridge.state_dict())
    with pytest.raises(UserError, match=message):
        ridge.remove(*request_())
    assert all(torch.equal(v, before[k]) for k, v in ridge.state_dict().items())


def test_no_factor_is_an_error_and_not_a_jitter():
    x, y = data()
    ridge = learner(gamma=1e-30)
    before = ridge.weight.clone()
    ridge.add(x[:3], y[:3])  # rank 3 of 24
    with pytest.raises(UserError, match=r"strategy.gamma: 1e-30 leaves A \+ γI without a Cholesky factor"):
        ridge.close()
    assert torch.equal(ridge.weight, before)


def test_bits_too_fine_for_exact_sums_are_refused():
    x, y = data()
    with pytest.raises(UserError, match=r"strategy.bits: 25 is too fine for exact sums .* \(valid: ≤ (\d+)") as error:
        learner(x, y, bits=25)
    valid = int(str(error.value).partition("≤ ")[2].partition(",")[0])
    learner(x, y, bits=valid)
    with pytest.raises(UserError):
        learner(x, y, bits=valid + 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "strategy.width: 0 is out of range"),
        ({"gamma": 0.0}, "strategy.gamma: 0.0 is out of range"),
        ({"bits": 27}, "strategy.bits: 27 is out of range"),
        ({"bits": -1}, "strategy.bits: -1 is out of range"),
    ],
)
def test_refuses_what_is_out_of_range(options, message):
    with pytest.raises(UserError, match=message):
        Ridge(**{"width": 4, "gamma": 0.1, **options})


@pytest.mark.parametrize("d", [1, 7, BLOCK, BLOCK + 3, 2 * BLOCK + 1])
def test_lower_triangles_stand_for_symmetric_matrices(d):
    draw = torch.Generator().manual_seed(0)
    x, v = (torch.randn(n, d, generator=draw, dtype=torch.float64) for n in (5, 3))
    matrix = torch.zeros(d, d, dtype=torch.float64)
    add_products(matrix, x, 1)
    torch.testing.assert_close(matrix.tril(), (x.T @ x).tril())
    torch.testing.assert_close(times(matrix, v.T), x.T @ (x @ v.T))


def test_the_bound_of_the_condition_holds_and_is_near():
    x, y = data(n=10)  # fewer samples than features: the least eigenvalue is γ
    ridge = learner(x, y)
    exact = np.linalg.cond((x.T @ x).numpy() + 0.1 * np.eye(D))
    assert 0.99 * exact < ridge.condition_bound() < 1.01 * exact


def test_rounding_keeps_to_the_grid_and_near():
    x = torch.rand(50, D, dtype=torch.float64)
    rounded = Ridge(D, 0.1, bits=6).rounded(x)
    assert (rounded * 64 == (rounded * 64).round()).all()
    assert (rounded - x).abs().max() <= 1 / 128
    assert Ridge(D, 0.1).rounded(x) is x


def test_state_comes_back_with_an_inverse_or_without():
    x, y = data()
    for options in WAYS:
        ridge, other = learner(x, y, bits=14, **options), Ridge(D, 0.1, bits=14, **options)
        other.grow(C)
        other.load_state_dict(ridge.state_dict())
        for r in (ridge, other):
            r.remove(x[:2], y[:2])
        assert all(torch.equal(v, other.state_dict()[k]) for k, v in ridge.state_dict().items())
