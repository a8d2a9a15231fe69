import math

import numpy as np
import pytest
import torch
from torch import nn

from clplat import Experience, Kind
from clplat.adapters.experts import ExpertLinear, imbalance
from clplat.errors import UserError
from clplat.strategies.loramoe import LoRAMoE
from clplat.strategies.naive import Naive

OPTIONS = {"experts": 4, "rank": 2, "alpha": 6.0, "dropout": 0.0, "optimizer": "sgd", "lr": 0.05, "warmup": 0.0}


def make(net, **options):
    return LoRAMoE(model=net, **{**OPTIONS, "schedule": "constant", **options})


def layer(experts=4, rank=2, dropout=0.0, trained=True):
    """A float64 layer of 5 inputs and 3 outputs; with `trained`, its experts have learned something."""
    torch.manual_seed(0)
    made = ExpertLinear(nn.Linear(5, 3), experts, rank, 6.0, dropout).double()
    if trained:
        nn.init.normal_(made.up)
    return made


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


# --- the layer --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(7,), (4, 6), (2, 3, 4)])
def test_outputs_by_hand(shape):
    made, x = layer(), torch.randn(*shape, 5, dtype=torch.float64)
    weight, bias, router, down, up = (
        p.detach().numpy() for p in (made.weight, made.bias, made.router, made.down, made.up)
    )
    expected = x.numpy() @ weight.T + bias
    gates = np.exp(x.numpy() @ router.T)
    gates /= gates.sum(-1, keepdims=True)
    for n in range(4):
        own = x.numpy() @ down[2 * n : 2 * n + 2].T @ up[:, 2 * n : 2 * n + 2].T
        expected += 3 * gates[..., [n]] * own
    np.testing.assert_allclose(made(x).detach().numpy(), expected, atol=1e-10)
    load = made.take_load()
    np.testing.assert_allclose(load.detach().numpy(), gates.reshape(shape[0], -1, 4).sum(1).T, atol=1e-10)
    np.testing.assert_allclose(load.sum(0).detach().numpy(), math.prod(shape[1:]), atol=1e-10)
    assert made.take_load() is None
    made.eval()(x)
    assert made.take_load() is None


def test_new_experts_change_nothing():
    made, x = layer(trained=False), torch.randn(4, 6, 5, dtype=torch.float64)
    assert torch.equal(made(x), nn.functional.linear(x, made.weight, made.bias))


def test_one_expert_is_an_adapter():
    made, x = layer(experts=1), torch.randn(7, 5, dtype=torch.float64)
    torch.testing.assert_close(made(x), x @ (made.weight + 3 * made.up @ made.down).T + made.bias)


def test_equal_experts_need_no_router():
    made, x = layer(), torch.randn(7, 5, dtype=torch.float64)
    with torch.no_grad():
        made.down.copy_(made.down[:2].repeat(4, 1))
        made.up.copy_(made.up[:, :2].repeat(1, 4))
        before = made(x)
        made.router.normal_()
    torch.testing.assert_close(made(x), before)


def test_each_expert_drops_inputs_of_its_own():
    made = layer(dropout=0.5)
    with torch.no_grad():
        made.router.zero_()
        made.down.copy_(made.down[:2].repeat(4, 1))
    x, seen = torch.ones(1, 5, dtype=torch.float64), []
    for n in range(4):  # expert n alone, at the same draw
        with torch.no_grad():
            made.up.zero_()[:, 2 * n : 2 * n + 2] = 1.0
        torch.manual_seed(0)
        seen.append((made(x) - nn.functional.linear(x, made.weight, made.bias)).detach())
    assert any(not torch.allclose(seen[0], other) for other in seen[1:])


# --- the constraint ---------------------------------------------------------------------------------------------------


def test_imbalance_by_hand():
    z = torch.rand(4, 3, dtype=torch.float64)
    assert imbalance(z).item() == pytest.approx(z.numpy().var(ddof=1) / z.numpy().mean() ** 2, rel=1e-8)
    torch.testing.assert_close(imbalance(7 * z), imbalance(z))
    assert imbalance(torch.full((4, 3), 0.3)).item() == pytest.approx(0, abs=1e-12)
    gap = tensor(1.1, 1.1, 1.1, 0.9, 0.9, 0.9)[:, None] / 6
    assert imbalance(gap).item() == pytest.approx(0.01 * 6 / 5)  # δ² K / (K − 1)
    assert imbalance(tensor(1, 0, 0, 0)[:, None]).item() == pytest.approx(4)  # all on one expert: N
    assert imbalance(tensor(1, 0, 0, 0)[:, None].expand(4, 3)).item() == pytest.approx(3 * 4 * 3 / (3 * 4 - 1))


def test_the_least_constraint_shares_by_the_inverse_coefficients():
    logits = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    coefficients = tensor(1.1, 1.1, 1.1, 0.9, 0.9, 0.9)
    optimizer = torch.optim.Adam([logits], lr=0.05)
    for _ in range(600):
        optimizer.zero_grad()
        imbalance((coefficients * logits.softmax(0))[:, None]).backward()
        optimizer.step()
    torch.testing.assert_close(logits.softmax(0), (1 / coefficients) / (1 / coefficients).sum(), atol=1e-4, rtol=0)


# --- the strategy -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("knowledge", [[], [0]])
def test_loss_by_hand(knowledge, experiences, model):
    (e,) = experiences(1)
    strategy = make(model(hidden=(7, 6)), knowledge=knowledge, balance=0.3, kind_gap=0.2).double()
    strategy.grow(e)
    strategy.double()
    x, y = e.train.all()
    loss = strategy.training_step((x.double(), y), 0)
    own, other = (1.2, 0.8) if knowledge else (0.8, 1.2)
    coefficients = tensor(own, own, other, other)[:, None]
    plain, inputs = strategy.losses(x.double(), y).mean(), x.double()
    expected = plain
    for made in strategy._layers:
        z = (coefficients * (inputs @ made.router.T).softmax(1).T).detach().numpy()
        expected = expected + 0.3 * z.var(ddof=1) / z.mean() ** 2
        inputs = made(inputs).relu()
    torch.testing.assert_close(loss, expected)


def test_the_constraint_reaches_the_routers_alone(experiences, model):
    (e,) = experiences(1)
    found = []
    for weight in (0.0, 1.0):
        strategy = make(model(hidden=(7,)), balance=weight)
        torch.manual_seed(0)
        strategy.grow(e)
        nn.init.normal_(strategy._layers[0].up, generator=torch.Generator().manual_seed(0))
        strategy._layers[0].router.data.normal_(generator=torch.Generator().manual_seed(1))
        strategy._layers[0].down.data.normal_(generator=torch.Generator().manual_seed(2))
        strategy.training_step(e.train.all(), 0).backward()
        found.append([p.grad.clone() for p in (strategy._layers[0].router, strategy._layers[0].down)])
    assert not torch.allclose(found[0][0], found[1][0])
    torch.testing.assert_close(found[0][1], found[1][1])


def test_only_experts_routers_and_the_head_learn(experiences, model, drive):
    net = model(hidden=(7, 6))
    before = {n: p.detach().clone() for n, p in net.backbone.named_parameters()}
    strategy = drive(make(net), experiences(2))
    after = dict(net.backbone.named_parameters())
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    assert after.keys() - before.keys() == {f"net.{i}.0.{part}" for i in (0, 1) for part in ("router", "down", "up")}
    assert all(made.up.any() for made in strategy._layers)


def test_without_a_router_or_constraint_it_is_an_adapter_beside_the_layer(experiences, model, drive):
    """With equal gates, 0 in the router, its steps are those of one adapter whose factors are all experts' together."""
    (e,), nets = experiences(1), [model(hidden=(7,)), model(hidden=(7,))]
    strategy = make(nets[0], balance=0.0)
    own = strategy._layers[0]
    with torch.no_grad():
        own.router.zero_().requires_grad_(False)
    down, up = (nn.Parameter(p.detach().clone()) for p in (own.down, own.up))
    plain = Naive(model=nets[1], lr=0.05)
    nets[1].backbone.requires_grad_(False)
    plain.down, plain.up = down, up
    base = nets[1].backbone.net[0][0]
    forward = base.forward
    base.forward = lambda x: forward(x) + 6.0 / 2 / 4 * x @ plain.down.T @ plain.up.T
    drive(strategy, [e])
    drive(plain, [e])
    torch.testing.assert_close(own.up, plain.up)
    torch.testing.assert_close(own.down, plain.down)


def test_experiences_that_bring_knowledge_are_told(experiences, model):
    strategy = make(model(), knowledge=[1, 5])
    assert strategy.faults(experiences(3), False) == [
        "strategy.knowledge: no experience has the index 5 (valid: 0 to 2)"
    ]
    for index, first in ((0, -1.0), (1, 1.0)):
        strategy.grow(Experience(index, "e", Kind.LEARN, None, classes=(0, 1)))
        assert strategy._signs.tolist() == [first, first, -first, -first]


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: make(model(), knowledge=[1]), experiences(2))


@pytest.mark.parametrize(
    ("option", "value"), [("experts", 3), ("rank", 0), ("alpha", 0), ("dropout", 1.0), ("kind_gap", 1), ("balance", -1)]
)
def test_refuses_values_out_of_range(option, value, model):
    with pytest.raises(UserError, match=rf"strategy.{option}: {value} is out of range"):
        make(model(), **{option: value})
