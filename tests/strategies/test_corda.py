from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from clplat.errors import UserError
from clplat.strategies.corda import CorDA, decomposed
from clplat.strategies.lora import SequentialLoRA

RANK = 3


def make(net, **options):
    return CorDA(model=net, **{"where": "ffn", "rank": RANK, "optimizer": "sgd", "lr": 0.05, **options})


def second(net, stream, drive, **options):
    """In float64, just before the first step of its second experience."""
    strategy = drive(make(net, **options), stream[:1]).double()
    strategy._prepare = lambda raw, augmented: raw.double()
    strategy.grow(stream[1])
    strategy.double()
    return strategy


def some(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_weight_is_its_parts_and_all_of_them_leave_nothing():
    weight, x = some(4, 6), some(50, 6, seed=1)
    u, s, vt = decomposed(weight, x.T @ x / 50)
    torch.testing.assert_close(u * s @ vt, weight, atol=1e-10, rtol=0)
    assert s.tolist() == sorted(s.tolist(), reverse=True)


def test_the_smallest_parts_have_the_least_energy_on_the_known_inputs():
    weight, x = some(4, 6), some(50, 6, seed=1) * torch.tensor([9.0, 5.0, 2.0, 1.0, 0.5, 0.1])
    covariance = x.T @ x / 50
    u, s, vt = decomposed(weight, covariance)
    damped = covariance + 0.01 * covariance.diagonal().mean() * torch.eye(6)
    energy = [(u[:, [i]] * s[i] @ vt[[i]] @ damped).norm().item() for i in range(4)]
    np.testing.assert_allclose(energy, s.numpy(), atol=1e-9)
    assert s[-1] < s[0] / 10


def test_with_white_inputs_it_is_the_singular_value_decomposition():
    weight = some(4, 6)
    u, s, vt = decomposed(weight, torch.eye(6, dtype=torch.float64))
    expected = torch.linalg.svdvals(weight)
    torch.testing.assert_close((u * s @ vt), weight)
    torch.testing.assert_close(s / 1.01, expected)
    torch.testing.assert_close(vt * 1.01 @ vt.T * 1.01, torch.eye(4, dtype=torch.float64))


def test_inputs_that_say_nothing_are_taken_as_white():
    u, s, vt = decomposed(some(3, 2), torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(u * s @ vt, some(3, 2))


def test_peft_has_the_same_parts():
    from peft.tuners.lora.corda import collect_eigens_for_layer

    layer = nn.Linear(6, 4).double()
    x = some(50, 6, seed=1)
    layer.covariance_matrix = x.T @ x / 50
    theirs = collect_eigens_for_layer(layer, SimpleNamespace())
    u, s, vt = decomposed(layer.weight.detach(), layer.covariance_matrix)
    torch.testing.assert_close(s, theirs.S_WC.double(), rtol=1e-4, atol=1e-5)
    for i in range(4):
        mine, other = u[:, [i]] @ vt[[i]], theirs.U_WC[:, [i]] @ theirs.V_WC[:, [i]].T
        torch.testing.assert_close(mine, other.double(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("samples", [256, None])
def test_what_is_known_is_kept_as_sums_over_samples(samples, experiences, model, drive):
    stream = experiences(2)
    strategy = drive(make(model(hidden=(7, 6)), samples=samples), stream)
    assert strategy.count == 48
    expected = torch.zeros(5, 5, dtype=torch.float64)
    for x in torch.cat([e.train.all()[0] for e in stream]).double():
        expected += x.outer(x) / x.abs().max() ** 2
    torch.testing.assert_close(next(iter(strategy.sums.values())).double(), expected, atol=1e-4, rtol=1e-5)


def test_adapters_begin_with_the_smallest_parts_and_no_output_changes(experiences, model, drive):
    stream = experiences(2)
    strategy = second(model(hidden=(7, 6)), stream, drive, alpha=6.0)
    weights = {n: layer.weight.detach().clone() for n, layer in strategy.adapters.base_layers().items()}
    x = some(9, 5)
    before = strategy.model.features(x)
    known = {n: s.detach() / strategy.count for n, s in zip(weights, strategy.sums.values(), strict=True)}
    strategy.begin(stream[1])
    torch.testing.assert_close(strategy.model.features(x), before, atol=1e-9, rtol=1e-9)
    for name, (a, b) in strategy.adapters.factors("task1").items():
        past_a, past_b = strategy.adapters.factors("task0")[name]
        u, s, vt = decomposed(weights[name] + 2 * past_b @ past_a, known[name])
        torch.testing.assert_close(2 * b @ a, u[:, -RANK:] * s[-RANK:] @ vt[-RANK:], atol=1e-9, rtol=1e-7)
        torch.testing.assert_close(b.norm(dim=0) ** 2, s[-RANK:] / 2)  # the root of S is in each factor
        start_a, start_b = strategy.adapters.factors("start1")[name]
        assert torch.equal(start_a, a)
        assert torch.equal(start_b, -b)


def test_what_an_adapter_took_over_stays_taken_while_it_learns(experiences, model, drive):
    stream, net = experiences(3), model(hidden=(7, 6))
    before = {n: p.detach().clone() for n, p in net.backbone.named_parameters()}
    strategy = drive(make(net), stream[:2])
    kept = {n: [p.detach().clone() for p in strategy.adapters.parameters_of(n)] for n in ("task0", "task1", "start1")}
    ranks = [torch.linalg.matrix_rank(d, atol=1e-6) for d in change_of(strategy, 1)]
    assert all(0 < r <= 2 * RANK for r in ranks)
    drive(strategy, stream[2:])
    for name, values in kept.items():
        now = strategy.adapters.parameters_of(name)
        assert all(torch.equal(a, b) for a, b in zip(values, now, strict=True))
    after = {n.replace("base_layer.", ""): p for n, p in net.backbone.named_parameters()}
    assert all(torch.equal(p, after[n]) for n, p in before.items())
    assert all(d.norm() > 1e-4 for d in change_of(strategy, 2))


def change_of(strategy, task):
    """What a task's adapter and the part that it took over have changed in each layer."""
    one, other = (strategy.adapters.delta(f"{n}{task}") for n in ("task", "start"))
    return [one[n] + other[n] for n in one]


def test_what_was_taken_over_is_not_dropped_out(experiences, model, drive):
    strategy = second(model(), experiences(2), drive, dropout=0.5)
    layer = strategy.model.backbone.get_submodule(strategy.adapters.layers[0])
    assert isinstance(layer.lora_dropout["start1"], nn.Identity)
    assert layer.lora_dropout["task1"].p == 0.5


def test_the_first_experience_has_a_plain_adapter(experiences, model, drive):
    (e,) = experiences(1)
    mine = drive(make(model(), alpha=6.0), [e])
    plain = SequentialLoRA(model=model(), where="ffn", rank=RANK, alpha=6.0, dropout=0.0, optimizer="sgd", lr=0.05)
    drive(plain, [e])
    pairs = zip(mine.adapters.parameters_of("task0"), plain.adapters.parameters_of("shared"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: make(model(), samples=5), experiences(3))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 6}, r"strategy.rank: 6 is out of range \(valid: 1 to 5, the smallest side of an adapted layer\)"),
        ({"samples": 0}, "strategy.samples: 0 is out of range"),
    ],
)
def test_refuses_values_out_of_range(options, message, model):
    with pytest.raises(UserError, match=message):
        make(model(), **options)
