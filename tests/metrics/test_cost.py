"""Costs, against counts by hand."""

import torch
from torch import nn

from clplat.metrics import cost


class Owner(nn.Module):
    """Stands in for a strategy: a model, a copy of it, a buffer, extra state."""

    def __init__(self, model: nn.Module, extra: object = None) -> None:
        super().__init__()
        self.model = model
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


def test_peak_memory():
    before = cost.peak_rss_bytes()
    held = torch.ones(30_000_000)
    assert cost.peak_rss_bytes() >= before > 50_000_000
    assert held.sum() > 0
    assert cost.peak_device_bytes(torch.device("cpu")) is None


def test_trainable_parameters():
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    assert cost.trainable_parameters(net) == 16 + 10
    net[0].requires_grad_(False)
    assert cost.trainable_parameters(net) == 10
    net[1].weight = net[0].weight
    assert cost.trainable_parameters(net) == 2


def test_a_strategy_without_state_stores_nothing():
    assert cost.stored_bytes(Owner(nn.BatchNorm1d(4))) == 0


def test_stored_bytes_counts_each_tensor_once():
    owner = Owner(nn.Linear(3, 4))
    owner.register_buffer("memory", torch.zeros(10, 2, dtype=torch.uint8))
    assert cost.stored_bytes(owner) == 20
    owner.slow = nn.Linear(3, 4)
    assert cost.stored_bytes(owner) == 20 + 16 * 4
    owner.alias, owner.same = owner.slow, owner.model
    assert cost.stored_bytes(owner) == 20 + 16 * 4


def test_stored_bytes_of_extra_state():
    shared = torch.zeros(5)
    extra = {
        "seen": 3,
        "sums": [torch.zeros(2, dtype=torch.float64), shared],
        "again": (shared,),
        "name": "é",
        "no": None,
    }
    assert cost.stored_bytes(Owner(nn.Linear(1, 1), extra)) == 8 + 16 + 20 + 2


def test_step_flops():
    net, x, steps = nn.Linear(5, 3), torch.ones(7, 5), []

    def step():
        steps.append(1)
        net(x).sum().backward()

    forward = 2 * 7 * 5 * 3
    assert cost.step_flops(step) == 2 * forward  # the inputs need no gradient, so backward is one product
    assert len(steps) == 1
    assert net.weight.grad is not None
    assert cost.step_flops(lambda: None) == 0
