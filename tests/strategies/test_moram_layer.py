"""A layer with atoms beside its weights, by itself: outputs by hand, what is chosen, what is trained."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clplat.adapters.atoms import AtomLinear, activations


def layer(tasks=2, rank=4, top=3, temperature=0.1, threshold=0.2, shape=(6, 9), seed=0, filled=True, dropout=0.0):
    """A layer of 9 inputs and 6 outputs with `tasks` · `rank` atoms whose values are random."""
    torch.manual_seed(seed)
    made = AtomLinear(nn.Linear(shape[1], shape[0]), top, temperature, threshold, dropout)
    for _ in range(tasks):
        made.append(rank)
        if filled:
            nn.init.normal_(made.new_values)
    return made


def bank(made):
    """Keys (R, d) and values (o, R)."""
    return torch.cat([made.keys, made.new_keys]), torch.cat([made.values, made.new_values], 1)


def mixture(p, top, temperature, threshold):
    """w of one token's projections, in NumPy; threshold None in training."""
    s = p / max(np.linalg.norm(p), 1e-12)
    chosen = np.argsort(-s, kind="stable")[:top]
    w = np.zeros_like(s)
    e = np.exp((s[chosen] - s[chosen].max()) / temperature)
    w[chosen] = e / e.sum()
    return w if threshold is None else np.where(s >= threshold, w, 0)


def weights(p, *settings):
    """w, from what `activations` gives."""
    return activations(p, *settings) / p


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("top", [2, 5, 8, 20])
def test_outputs_by_hand(mode, top):
    made = layer(top=top).double().train(mode)
    x = torch.randn(2, 5, 9, dtype=torch.float64)
    keys, values = (t.detach().numpy() for t in bank(made))
    expected = F.linear(x, made.weight, made.bias).detach().numpy()
    for i in range(2):
        for j in range(5):
            p = keys @ x[i, j].numpy()
            w = mixture(p, min(top, 8), 0.1, None if mode else 0.2)
            expected[i, j] += values @ (w * p)
    np.testing.assert_allclose(made(x).detach().numpy(), expected, atol=1e-12)


def test_new_atoms_of_the_first_task_change_nothing():
    made = layer(tasks=1, filled=False)
    x = torch.randn(7, 9)
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    assert torch.equal(made.eval()(x), F.linear(x, made.weight, made.bias))
    assert not layer(tasks=0)(x).isnan().any()


def test_weights_in_training_and_evaluation():
    torch.manual_seed(0)
    p = torch.randn(200, 12)
    p = p[((F.normalize(p, dim=1) - 0.3).abs() > 1e-4).all(1)]  # none on the threshold, where rounding would decide
    s = F.normalize(p, dim=1)
    w = weights(p, 4, 0.05, -1.0)
    assert (w >= 0).all()
    torch.testing.assert_close(w.sum(1), torch.ones(len(p)), atol=1e-5, rtol=0)
    assert ((w > 0).sum(1) <= 4).all()
    assert (w[s < s.sort(1).values[:, [-4]]] == 0).all()  # signed: never the most opposed
    gated = weights(p, 12, 0.05, 0.3)
    assert (gated.sum(1) <= 1 + 1e-5).all()
    assert (s[gated > 0] >= 0.3).all()
    full = weights(p, 12, 0.05, -1.0)
    torch.testing.assert_close(gated, full * (s >= 0.3))  # what is left is not normalised anew


@pytest.mark.parametrize(("threshold", "most"), [(0.2, 25), (0.5, 4)])
def test_at_most_so_many_atoms_pass_the_threshold(threshold, most):
    torch.manual_seed(0)
    found = (activations(torch.rand(500, 64), 64, 10.0, threshold) != 0).sum(1).max()
    equal = (activations(torch.ones(1, most), most, 10.0, threshold - 1e-6) != 0).sum()
    assert found <= most
    assert equal == most


def test_a_threshold_above_one_gives_the_backbone_back():
    made = layer(threshold=1.1).eval()
    x = torch.randn(7, 9)
    assert torch.equal(made(x), F.linear(x, made.weight, made.bias))
    assert not torch.equal(made.train()(x), F.linear(x, made.weight, made.bias))


def test_scale_of_the_input():
    p = torch.randn(50, 12, dtype=torch.float64)
    out = activations(p, 4, 0.05, 0.2)
    torch.testing.assert_close(activations(3.7 * p, 4, 0.05, 0.2), 3.7 * out)
    assert not torch.allclose(activations(-p, 4, 0.05, 0.2), -out)


def test_limits_of_the_temperature():
    made = layer(top=8, temperature=1e9)
    x = torch.randn(7, 9)
    keys, values = bank(made)
    plain = F.linear(x, made.weight, made.bias)
    torch.testing.assert_close(made(x) - plain, x @ keys.T @ values.T / 8, atol=1e-5, rtol=1e-4)
    made.temperature = 1e-6
    best = (x @ keys.T).argmax(1)
    one = (x * keys[best]).sum(1)[:, None] * values[:, best].T
    torch.testing.assert_close(made(x) - plain, one, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", [True, False])
def test_the_order_of_atoms_means_nothing(mode):
    made = layer().train(mode)
    x = torch.randn(7, 9)
    before, order = made(x), torch.randperm(4)
    with torch.no_grad():
        made.new_keys.copy_(made.new_keys[order])
        made.new_values.copy_(made.new_values[:, order])
    torch.testing.assert_close(made(x), before)


def test_gradients_of_what_is_not_chosen():
    made = layer(tasks=1, rank=6, top=2)
    made(torch.randn(1, 9)).square().sum().backward()
    chosen = made.new_values.grad.abs().sum(0) > 0
    assert 1 <= chosen.sum() <= 2
    assert (made.new_values.grad[:, ~chosen] == 0).all()
    assert (made.new_keys.grad[~chosen].abs().sum(1) > 0).all()  # through the norm of p
    assert made.weight.grad is not None  # the strategy freezes it


def test_appending_freezes_what_is_there():
    made = layer(tasks=1)
    keys, values = (t.clone() for t in bank(made))
    made.append(3)
    assert made.keys.shape == (4, 9)
    assert made.new_keys.shape == (3, 9)
    assert torch.equal(made.keys, keys)
    assert torch.equal(made.values, values)
    assert not made.keys.requires_grad
    assert not made.values.requires_grad
    assert made.new_keys.requires_grad
    assert not made.new_values.any()
    bound = 1 / math.sqrt(9)
    assert 0.5 * bound < made.new_keys.abs().max() <= bound
    made(torch.randn(5, 9)).sum().backward()
    assert made.keys.grad is None
    assert made.values.grad is None


def test_appending_changes_outputs_although_the_values_are_zero():
    made = layer(tasks=1, rank=16, top=16, temperature=0.01, shape=(32, 32)).eval()
    x = torch.randn(20, 32)
    plain = F.linear(x, made.weight, made.bias)
    before = (made(x) - plain).norm()
    made.append(16)
    assert (made(x) - plain).norm() < 0.9 * before


def test_a_stored_task_counts_in_full():
    """No scale is lost when a task's atoms become old ones."""
    made = layer(tasks=1).eval()
    x = torch.randn(7, 9)
    before = made(x)
    made.append(1)
    with torch.no_grad():
        made.new_keys.zero_()  # an atom that competes for nothing: s = 0, under the threshold
    made.temperature = 0.001
    again = made(x)
    made.new_keys = nn.Parameter(made.new_keys[:0])
    made.new_values = nn.Parameter(made.new_values[:, :0])
    keys, values = bank(made)
    direct = F.linear(x, made.weight, made.bias) + F.linear(activations(x @ keys.T, 3, 0.001, 0.2), values)
    torch.testing.assert_close(again, direct, atol=1e-5, rtol=1e-4)
    made.temperature = 0.1
    direct = F.linear(x, made.weight, made.bias) + F.linear(activations(x @ keys.T, 3, 0.1, 0.2), values)
    torch.testing.assert_close(before, direct)


def test_scores_are_in_single_precision_under_autocast():
    made = layer(tasks=1, temperature=0.01).bfloat16()
    assert made.keys.dtype == torch.bfloat16  # by hand here; built on half-precision weights they are wide:
    half = AtomLinear(nn.Linear(9, 6, dtype=torch.bfloat16), 3, 0.01, 0.2, 0.0)
    half.append(4)
    assert half.new_keys.dtype == torch.float32
    made = layer(temperature=0.01)
    nn.init.zeros_(made.weight)
    nn.init.zeros_(made.bias)
    x = torch.randn(64, 9)
    exact = made(x)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = made(x)
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed.float(), exact, atol=1e-5, rtol=2**-8)  # the last rounding, and no other


def test_dropout_is_for_training():
    made = layer(dropout=0.5)
    x = torch.randn(7, 9)
    assert not torch.equal(made(x), made(x))
    assert torch.equal(made.eval()(x), made(x))
