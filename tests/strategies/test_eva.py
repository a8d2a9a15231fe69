import warnings

import numpy as np
import pytest
import torch
from torch import nn

from clplat.errors import UserError
from clplat.strategies.eva import EVA, Moments, ranks
from clplat.strategies.lora import SequentialLoRA

RANK = 3


def make(net, **options):
    return EVA(model=net, **{"where": "ffn", "rank": RANK, "optimizer": "sgd", "lr": 0.05, **options})


def begun(net, experience, **options):
    """In float64, just before its first step."""
    strategy = make(net, **options).double()
    strategy.grow(experience)
    strategy.double()._prepare = lambda raw, augmented: raw.double()
    strategy.begin(experience)
    return strategy


def inputs_of(net, experience):
    """Inputs (n, d) of each of the two layers of an mlp, by hand in NumPy."""
    x = experience.train.all()[0].double().numpy()
    layer = net.backbone.get_submodule("net.0.0")
    w, b = (p.detach().double().numpy().copy() for p in (layer.weight, layer.bias))
    return [x, np.maximum(x @ w.T + b, 0)]


def principal(x):
    """Principal axes (k, d), shares of the variance and singular values of x (n, d), independent of what is tested."""
    _, s, vt = np.linalg.svd(x - x.mean(0), full_matrices=False)
    return vt, s**2 / (s**2).sum(), s


@pytest.mark.parametrize("whiten", [False, True])
def test_adapters_begin_with_the_principal_axes_of_their_inputs(whiten, experiences, model):
    net, (e,) = model(hidden=(7, 6)), experiences(1)
    seen = inputs_of(net, e)
    strategy = begun(net, e, whiten=whiten, rho=1.0)
    for x, (a, b) in zip(seen, strategy.adapters.factors("task0").values(), strict=True):
        axes, _, sizes = principal(x)
        rows = a.detach().numpy() * np.sqrt(sizes[:RANK, None]) if whiten else a.detach().numpy()
        np.testing.assert_allclose(np.abs(rows @ axes[:RANK].T), np.eye(RANK), atol=1e-7)
        assert not b.any()


def test_the_budget_goes_where_the_shares_of_variance_are_largest(experiences, model):
    net, (e,) = model(hidden=(7, 6)), experiences(1)
    e.train.inputs[:] = torch.randn(24, 5, generator=torch.Generator().manual_seed(0))  # alike in all directions
    shares = [principal(x)[1][: 2 * RANK] for x in inputs_of(net, e)]
    least = np.sort(np.concatenate(shares))[-2 * RANK]
    expected = [int((s >= least).sum()) for s in shares]
    strategy = begun(net, e, rho=2.0)
    found = [int(a.any(1).sum()) for a, _ in strategy.adapters.factors("task0").values()]
    assert found == expected
    assert sum(found) == 2 * RANK
    assert found[0] != found[1]
    assert strategy.measurements() == {"least_rank": min(found), "largest_rank": max(found)}
    assert strategy.adapters.scale("task0") == pytest.approx(1 / RANK)  # of all layers, whatever their ranks


def test_ranks_by_hand():
    assert ranks([torch.tensor([0.5, 0.3]), torch.tensor([0.9, 0.1])], 3) == [2, 1]
    assert ranks([torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5])], 2) == [2, 0]  # of equal ones the first
    assert ranks([torch.tensor([0.6]), torch.tensor([])], 2) == [1, 0]


def test_moments_in_parts_are_those_of_the_whole():
    x = 1e6 + torch.randn(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    moments = Moments()
    for part in x.split(7):
        moments.add(part)
    vectors, shares, sizes = moments.components(4)
    axes, expected, singular = principal(x.numpy())
    np.testing.assert_allclose(shares.numpy(), expected, atol=1e-10)
    np.testing.assert_allclose(sizes.numpy(), singular, atol=1e-8)
    np.testing.assert_allclose(np.abs(vectors.numpy() @ axes.T), np.eye(4), atol=1e-8)
    torch.testing.assert_close(moments.components(2)[1], shares[:2])  # shares of all variance, not of what is asked for


def test_directions_without_variance_are_not_taken():
    moments = Moments()
    moments.add(torch.tensor([[1.0, 0.0, 2.0], [3.0, 0.0, 2.0], [2.0, 0.0, 2.0]], dtype=torch.float64))
    vectors, shares, _ = moments.components(3)
    torch.testing.assert_close(vectors.abs(), torch.tensor([[1.0, 0.0, 0.0]], dtype=torch.float64))
    assert shares.tolist() == [1.0]


def test_peft_takes_the_same_directions_ranks_and_scale(experiences, model):
    from peft import EvaConfig, LoraConfig, get_peft_model, initialize_lora_eva_weights

    (e,) = experiences(1)
    strategy = begun(model(hidden=(7, 6)), e, rank=2, rho=2.0, alpha=6.0)
    config = LoraConfig(
        r=2, lora_alpha=6, target_modules=["net.0.0", "net.1.0"], init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = get_peft_model(model(hidden=(7, 6)).backbone, config)
        x = e.train.all()[0]
        initialize_lora_eva_weights(
            theirs, [x, x], forward_fn=lambda net, batch: net(batch), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, show_progress_bar=False,
        )  # fmt: skip
    for name, (a, _) in strategy.adapters.factors("task0").items():
        layer = theirs.base_model.model.get_submodule(name)
        other = layer.lora_A["default"].weight.detach().double()
        mine = a.detach()[a.any(1)]
        assert mine.shape == other.shape
        assert layer.scaling["default"] == pytest.approx(strategy.adapters.scale("task0"))
        torch.testing.assert_close((mine @ other.T).abs(), torch.eye(len(mine)).double(), atol=1e-3, rtol=0)


def test_rows_that_a_layer_did_not_get_stay_zero_and_the_rest_learns(experiences, model, drive):
    stream = experiences(2)
    for optimizer in ("sgd", "adamw"):
        net = model(hidden=(7, 6))
        before = {n: p.detach().clone() for n, p in net.backbone.named_parameters()}
        strategy = drive(make(net, rho=2.0, optimizer=optimizer, weight_decay=0.1), stream)
        for task in ("task0", "task1"):
            found = [(int(a.any(1).sum()), int(b.any(0).sum())) for a, b in strategy.adapters.factors(task).values()]
            assert sum(a for a, _ in found) == 2 * RANK
            assert all(a == b for a, b in found)  # a direction that was taken is learned by, and no other one
        after = {n.replace("base_layer.", ""): p for n, p in net.backbone.named_parameters()}
        assert all(torch.equal(p, after[n]) for n, p in before.items())


def test_a_new_experience_changes_no_output_and_has_directions_of_its_own(experiences, model, drive):
    stream = experiences(2)
    strategy = drive(make(model(hidden=(7, 6)), rho=1.0), stream[:1])
    x = stream[1].train.all()[0]
    before = strategy.model.features(x)
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    assert torch.equal(strategy.model.features(x), before)
    first, second = (next(iter(strategy.adapters.factors(n).values()))[0] for n in ("task0", "task1"))
    assert not torch.allclose((first @ second.T).abs(), torch.eye(RANK), atol=1e-2)


def test_the_first_gradient_is_larger_than_with_random_directions(experiences, model):
    """‖dL/dB‖ at the first step, on inputs that vary in few directions."""
    (e,) = experiences(1)
    x = torch.randn(24, 5, generator=torch.Generator().manual_seed(0)) * torch.tensor([5.0, 5.0, 5.0, 0.01, 0.01])
    e.train.inputs[:24] = x
    strategy = begun(model(hidden=(7,)), e, rho=1.0)
    labels = e.train.targets()
    ((a, b),) = strategy.adapters.factors("task0").values()
    sizes = []
    for draw in range(5):
        strategy.losses(x.double(), labels).mean().backward()
        assert not a.grad.any()
        sizes.append(b.grad.norm().item())
        strategy.zero_grad()
        with torch.no_grad():
            nn.init.orthogonal_(a, generator=torch.Generator().manual_seed(draw))
    assert sizes[0] > max(sizes[1:])


def test_it_is_lora_but_for_where_it_begins(experiences, model, drive):
    (e,) = experiences(1)
    mine = make(model(), rho=1.0)
    mine.begin = lambda experience: None
    drive(mine, [e])
    plain = SequentialLoRA(model=model(), where="ffn", rank=RANK, alpha=1.0, dropout=0.0, optimizer="sgd", lr=0.05)
    drive(plain, [e])
    pairs = zip(mine.adapters.parameters_of("task0"), plain.adapters.parameters_of("shared"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: make(model(), rho=2.0, samples=5), experiences(2))


@pytest.mark.parametrize(("option", "value"), [("rank", 0), ("rho", 0.5), ("samples", 0)])
def test_refuses_values_out_of_range(option, value, model):
    with pytest.raises(UserError, match=rf"strategy.{option}: {value} is out of range"):
        make(model(), **{option: value})
