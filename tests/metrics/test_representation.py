"""Dormant units, effective rank and norms; and that measuring leaves no trace."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from clplat.metrics.representation import dormant_fraction, effective_rank, gradient_norm, measure, weight_norm


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(0, 99), st.floats(0.01, 100))
def test_effective_rank(n, d, seed, scale):
    x = normal(n, d, seed=seed)
    rank = effective_rank(x)
    sigma = torch.linalg.svd(x.double()).S
    p = [float(s / sigma.sum()) for s in sigma if s > 0]
    assert rank == pytest.approx(math.exp(-sum(q * math.log(q) for q in p)), rel=1e-4)
    assert 1 - 1e-9 <= rank <= min(n, d) + 1e-9
    rotation = torch.linalg.qr(normal(d, d, seed=seed + 1)).Q
    for same in (x * scale, x.flip(0), x @ rotation, x.T):
        assert effective_rank(same) == pytest.approx(rank, rel=1e-4)


def test_effective_rank_limits():
    assert effective_rank(torch.eye(7)) == pytest.approx(7)
    assert effective_rank(normal(20, 1) @ normal(1, 30)) == pytest.approx(1, abs=1e-3)
    assert effective_rank(torch.ones(5, 3)) == pytest.approx(1)  # not centred: a constant is one direction
    assert effective_rank(torch.zeros(5, 3)) == 0
    assert math.isnan(effective_rank(torch.tensor([[math.inf, 1.0]])))


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.0, 0.025, 0.1, 0.3, 0.7]))
def test_dormant_fraction(n, units, seed, threshold):
    h = normal(n, units, seed=seed).relu()
    fraction = dormant_fraction([h], threshold)
    mean = [float(h[:, u].abs().mean()) for u in range(units)]
    layer = sum(mean) / units
    dormant = [u for u in range(units) if layer == 0 or mean[u] / layer <= threshold]
    assert abs(fraction * units - len(dormant)) < 1e-4
    assert dormant_fraction([h * 4], threshold) == fraction
    assert dormant_fraction([h.flip(1)], threshold) == fraction
    # Positions count as samples: an image of one pixel, a sequence of n.
    assert dormant_fraction([h[:, :, None, None]], threshold) == fraction
    assert dormant_fraction([h[None]], threshold) == pytest.approx(fraction)


def test_dormant_fraction_over_layers_counts_units():
    alive, dead = torch.ones(2, 3), torch.zeros(2, 1)
    assert dormant_fraction([alive]) == 0
    assert dormant_fraction([dead]) == 1
    assert dormant_fraction([alive, dead]) == 0.25
    assert math.isnan(dormant_fraction([]))


def test_norms():
    net = nn.Linear(3, 2)
    flat = torch.cat([p.detach().flatten() for p in net.parameters()])
    assert weight_norm(net.parameters()) == pytest.approx(float(flat.norm()))
    assert gradient_norm(net.parameters()).item() == 0
    net(torch.ones(1, 3)).sum().backward()
    assert gradient_norm(net.parameters()).item() == pytest.approx(math.sqrt(2 * 3 + 2))


class Net(nn.Module):
    """Batch norm, dropout, one activation called twice, one unit that is always off."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.drop = nn.Dropout(0.5)
        self.act = nn.ReLU()
        self.head = nn.Linear(5, 2)
        with torch.no_grad():
            self.norm.weight[0], self.norm.bias[0] = 0.0, -1.0

    def features(self, x):
        return self.act(self.act(self.drop(self.norm(self.body(x)))))

    def forward(self, x):
        return self.head(self.features(x))


def test_measure():
    torch.manual_seed(0)
    net, x = Net(), normal(50, 4)
    found = measure(net, x)
    net.eval()
    h = net.features(x).detach()
    assert found == {
        "dormant_fraction": pytest.approx(dormant_fraction([h, h])),
        "effective_rank": pytest.approx(effective_rank(h)),
        "weight_norm": pytest.approx(weight_norm(net.parameters())),
    }
    assert found["dormant_fraction"] == pytest.approx(0.2)
    assert measure(net, x, max_samples=10)["effective_rank"] == pytest.approx(effective_rank(h[:10]))


def test_measure_leaves_no_trace():
    net = Net().train()
    net.norm.eval()  # a frozen part keeps its own mode
    modes = [m.training for m in net.modules()]
    before = {k: v.clone() for k, v in net.state_dict().items()}
    state = torch.get_rng_state()
    measure(net, normal(20, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not any(m._forward_hooks for m in net.modules())
    assert all(p.grad is None for p in net.parameters())


def test_a_failing_forward_leaves_no_trace_either():
    net = Net().train()
    with pytest.raises(RuntimeError):
        measure(net, torch.zeros(3, 9))
    assert all(m.training for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())


def test_a_model_that_draws_in_evaluation_consumes_no_randomness():
    class Noisy(nn.Module):
        def forward(self, x):
            return x + torch.randn_like(x)

    state = torch.get_rng_state()
    found = measure(Noisy(), normal(8, 4))
    assert torch.equal(torch.get_rng_state(), state)
    assert found["dormant_fraction"] is None
    assert found["weight_norm"] == 0


def test_what_is_not_finite_is_none():
    net = Net()
    with torch.no_grad():
        net.body.weight.fill_(math.nan)
    assert measure(net, normal(8, 4)) == {"dormant_fraction": None, "effective_rank": None, "weight_norm": None}


@pytest.mark.parametrize("apply", [F.relu, torch.relu, torch.relu_, F.gelu, torch.Tensor.tanh, nn.SiLU()])
def test_activations_as_functions_count_as_modules_do(apply):
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 6)
            self.apply_ = apply

        def forward(self, x):
            return self.apply_(self.body(x))

    net, x = Plain(), normal(30, 4)
    with torch.no_grad():
        net.body.weight[:2], net.body.bias[:2] = 0.0, 0.0
    assert measure(net, x)["dormant_fraction"] == pytest.approx(2 / 6)


def test_a_module_composed_of_functions_is_one_layer():
    class Composed(nn.Module):
        def forward(self, x):
            return torch.tanh(x) + 1

    Composed.__module__ = "transformers.activations"
    net = nn.Sequential(nn.Linear(4, 6), Composed())
    with torch.no_grad():
        net[0].weight[:2], net[0].bias[:2] = 0.0, 0.0
    assert measure(net, normal(30, 4))["dormant_fraction"] == 0


def test_a_fused_encoder_layer_is_seen():
    net = nn.TransformerEncoderLayer(8, 2, dim_feedforward=10, batch_first=True)
    with torch.no_grad():
        net.linear1.weight[:5], net.linear1.bias[:5] = 0.0, 0.0
    assert measure(net, normal(3, 4, 8))["dormant_fraction"] == pytest.approx(0.5)


def test_softmax_is_no_unit():
    assert measure(nn.Sequential(nn.Linear(4, 3), nn.Softmax(-1)), normal(8, 4))["dormant_fraction"] is None
