import math

import numpy as np
import pytest
import torch
from torch import nn

from clplat import Experience, Kind
from clplat.backbones.heads import Growing, Linear
from clplat.errors import UserError
from clplat.strategies.olora import OLoRA, overlap


def make(net, **options):
    plain = {"where": "ffn", "rank": 2, "dropout": 0.0, "optimizer": "sgd", "lr": 0.05}
    return OLoRA(model=net, **{**plain, **options})


def grown(net, count, **options):
    """A strategy that has met `count` experiences; all B are random, as if trained."""
    strategy = make(net, **options)
    for k in range(count):
        strategy.grow(Experience(k, f"e{k}", Kind.LEARN, None, classes=(2 * k, 2 * k + 1)))
    with torch.no_grad():
        for name in strategy.adapters.adapters:
            for _, b in strategy.adapters.factors(name).values():
                nn.init.normal_(b, std=0.1)
    return strategy


# --- the penalty ------------------------------------------------------------------------------------------------------


def test_overlap_by_hand():
    past, new = torch.tensor([[[1.0, 2.0], [0.0, -1.0]]]), torch.tensor([[[3.0, 1.0]]])
    assert overlap(past, new, "abs").item() == 5 + 1
    assert overlap(past, new, "squared").item() == 25 + 1


@pytest.mark.parametrize("penalty", ["abs", "squared"])
def test_overlap_adds_over_the_past_and_over_layers(penalty):
    torch.manual_seed(0)
    a, b, new = torch.randn(3, 2, 5), torch.randn(3, 4, 5), torch.randn(3, 2, 5)
    whole = overlap(torch.cat([a, b], 1), new, penalty)
    torch.testing.assert_close(whole, overlap(a, new, penalty) + overlap(b, new, penalty))
    each = sum(overlap(a[[i]], new[[i]], penalty) for i in range(3))
    torch.testing.assert_close(overlap(a, new, penalty), each)


def test_gradient_of_the_overlap():
    torch.manual_seed(0)
    past, new = torch.randn(1, 6, 5, dtype=torch.float64), torch.randn(1, 2, 5, dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(overlap(past, new, "abs"), new)
    torch.testing.assert_close(found, (new @ past.mT).sign() @ past)
    (found,) = torch.autograd.grad(overlap(past, new, "squared"), new)
    torch.testing.assert_close(found, 2 * new @ past.mT @ past)


def test_rows_outside_the_past_span_have_none_and_answer_nothing():
    torch.manual_seed(0)
    past, new = torch.randn(1, 3, 8, dtype=torch.float64), torch.randn(1, 2, 8, dtype=torch.float64)
    outside = new - new @ torch.linalg.pinv(past) @ past
    assert overlap(past, outside, "abs") < 1e-5
    inside = torch.randn(5, 3, dtype=torch.float64) @ past[0]
    assert (inside @ outside[0].T).abs().max() < 1e-5


def test_overlap_of_fresh_factors():
    """E Ω = layers · R · r · sqrt(2/π) / (3 sqrt(d)); 77 for one past task in T5-large."""
    torch.manual_seed(0)
    layers, rank, d = 144, 8, 1024
    past, new = (nn.init.kaiming_uniform_(torch.empty(layers * rank, d), a=math.sqrt(5)) for _ in range(2))
    found = overlap(past.view(layers, rank, d), new.view(layers, rank, d), "abs").item()
    expected = layers * rank * rank * math.sqrt(2 / math.pi) / (3 * math.sqrt(d))
    assert expected == pytest.approx(77, abs=1)
    assert found == pytest.approx(expected, rel=0.03)


# --- the strategy -----------------------------------------------------------------------------------------------------


def test_no_overlap_in_the_first_task_and_some_from_the_second(model):
    assert grown(model(), 1)._overlap().item() == 0
    assert grown(model(), 2)._overlap().item() > 0.1
    three, factors = grown(model(hidden=(7, 5, 6)), 3), []
    for name in three.adapters.adapters:
        factors.append([a for a, _ in three.adapters.factors(name).values()])
    by_hand = sum((p @ n.T).abs().sum() for past in factors[:2] for p, n in zip(past, factors[2], strict=True))
    torch.testing.assert_close(three._overlap(), by_hand)
    assert three.measurements()["overlap"] == pytest.approx(by_hand.item(), rel=1e-5)


def test_loss_by_hand(model):
    plain = grown(model(), 2, orthogonality=[0.0])
    full = grown(model(), 2, orthogonality=[0.3], shrinkage=[0.7])
    full.load_state_dict(plain.state_dict())
    x, y = torch.randn(6, 5), torch.tensor([2, 3, 2, 3, 2, 3])
    ((a, b),) = full.adapters.factors("task1").values()
    ((past, _),) = full.adapters.factors("task0").values()
    difference = full.training_step((x, y), 0) - plain.training_step((x, y), 0)
    expected = 0.3 * (past @ a.T).abs().sum() + 0.7 * (a.square().sum().sqrt() + b.square().sum().sqrt())
    torch.testing.assert_close(difference, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("penalty", ["abs", "squared"])
def test_first_update_and_inference_by_hand(model, experiences, penalty):
    """A and B of the second task after one SGD step, in NumPy."""
    strategy = grown(model(), 2, penalty=penalty, shrinkage=[0.7], alpha=6.0).double()
    net, e = strategy.model, experiences(2)[1]
    layer = net.backbone.net[0][0]
    ((past_a, past_b),), ((a, b),) = (strategy.adapters.factors(n).values() for n in ("task0", "task1"))
    p, pb, na, nb = (t.detach().numpy().copy() for t in (past_a, past_b, a, b))
    base, c = layer.base_layer.weight.detach().numpy(), net.head.weight.detach().numpy().copy()
    bias, d = layer.base_layer.bias.detach().numpy(), net.head.bias.detach().numpy().copy()
    x, y = e.train.all()
    x = x.double()
    optimizer = strategy.configure_optimizers()
    strategy.training_step((x, y), 0).backward()
    optimizer.step()
    pre = x.numpy() @ (base + 3 * pb @ p + 3 * nb @ na).T + bias
    logits = np.maximum(pre, 0) @ c.T + d
    error = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    error = (error - np.eye(len(c))[y]) / len(x)
    g = ((error @ c) * (pre > 0)).T @ x.numpy()
    omega = np.sign(na @ p.T) @ p if penalty == "abs" else 2 * na @ p.T @ p
    na2 = na - 0.05 * (3 * nb.T @ g + 0.5 * omega + 0.7 * na / np.linalg.norm(na))
    nb2 = nb - 0.05 * (3 * g @ na.T + 0.7 * nb / np.linalg.norm(nb))
    np.testing.assert_allclose(a.detach().numpy(), na2, atol=1e-9)
    np.testing.assert_allclose(b.detach().numpy(), nb2, atol=1e-9)
    hidden = np.maximum(x.numpy() @ (base + 3 * pb @ p + 3 * nb2 @ na2).T + bias, 0)
    expected = hidden @ net.head.weight.detach().numpy().T + net.head.bias.detach().numpy()
    np.testing.assert_allclose(strategy.predict(x).detach().numpy(), expected, atol=1e-9)


def test_the_penalty_reaches_the_new_down_projection_only(model):
    strategy = grown(model(), 2)
    strategy._overlap().backward()
    reached = {n for n, p in strategy.named_parameters() if p.grad is not None}
    assert len(reached) == 1
    assert next(iter(reached)).endswith("lora_A.task1.weight")


def test_norms_have_no_gradient_at_zero(model):
    strategy = make(model(), shrinkage=[0.5])
    strategy.grow(Experience(0, "a", Kind.LEARN, None, classes=(0, 1)))
    strategy.training_step((torch.randn(4, 5), torch.tensor([0, 1, 0, 1])), 0).backward()
    assert all(p.grad.isfinite().all() for p in strategy.parameters() if p.grad is not None)


def test_weights_per_experience(model, experiences, drive):
    used = []
    strategy = make(model(), orthogonality=[0.0, 0.5, 5.0], shrinkage=[0.0])
    strategy._overlap = lambda inner=strategy._overlap: used.append(len(strategy.adapters.adapters)) or inner()
    drive(strategy, experiences(3), epochs=1, batch=24)
    assert used == [2, 3]
    two = grown(model(), 3, orthogonality=[0.0, 0.5])
    x, y = torch.randn(4, 5), torch.tensor([4, 5, 4, 5])
    loss = two.training_step((x, y), 0) - two.mean(two.losses(x, y))
    torch.testing.assert_close(loss, 0.5 * two._overlap(), atol=1e-5, rtol=1e-4)  # the last one goes on


def test_a_new_task_leaves_every_output(model, experiences, drive):
    stream = experiences(2)
    strategy = drive(make(model()), stream[:1])
    x = torch.randn(9, 5)
    before = strategy.model.features(x)
    strategy.grow(stream[1])
    assert torch.equal(strategy.model.features(x), before)


def test_only_the_last_adapter_learns(model, experiences, drive):
    strategy = make(model(hidden=(7, 6)))
    backbone = {n: p.detach().clone() for n, p in strategy.model.backbone.named_parameters()}
    kept = {}
    for t, e in enumerate(experiences(3)):
        drive(strategy, [e])
        for name, held in kept.items():
            now = strategy.adapters.parameters_of(name)
            assert all(torch.equal(a, b) for a, b in zip(held, now, strict=True)), name
            assert not any(p.requires_grad for p in now)
        assert strategy.adapters.active == tuple(f"task{k}" for k in range(t + 1))
        kept[f"task{t}"] = [p.detach().clone() for p in strategy.adapters.parameters_of(f"task{t}")]
        assert all(b.any() for _, b in strategy.adapters.factors(f"task{t}").values())
    after = {n.replace("base_layer.", ""): p for n, p in strategy.model.backbone.named_parameters()}
    assert all(torch.equal(p, after[n]) for n, p in backbone.items())


def test_without_penalties_it_is_a_new_adapter_for_each_task(model, experiences, drive):
    """IncLoRA, step by step, on plain peft."""
    from peft import LoraConfig, inject_adapter_in_model

    from clplat.strategies.naive import Naive

    class IncLoRA(Naive):
        met = 0

        def grow(self, experience):
            super().grow(experience)
            config = LoraConfig(r=2, lora_alpha=32, target_modules=["net.0.0"])
            inject_adapter_in_model(config, self.model.backbone, f"task{self.met}")
            names = [f"task{k}" for k in range(self.met + 1)]
            self.model.backbone.net[0][0].set_adapter(names)
            for name, p in self.model.backbone.named_parameters():
                p.requires_grad_(f".task{self.met}." in name)
            del self.model.backbone.peft_config
            self.met += 1

    mine, theirs = [], []
    note = lambda found: lambda s: found.append({n: p.detach().clone() for n, p in s.model.named_parameters()})  # noqa: E731
    drive(make(model(), orthogonality=[0.0], alpha=32.0), experiences(3), each_step=note(mine))
    drive(IncLoRA(model=model(), lr=0.05), experiences(3), each_step=note(theirs))
    assert len(mine) == len(theirs) > 0
    for a, b in zip(mine, theirs, strict=True):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[n], b[n]) for n in a)


def test_the_sum_is_the_concatenation_is_the_merged_weight(model, experiences, drive):
    strategy = drive(make(model(), alpha=6.0), experiences(3)).eval()
    layer = strategy.model.backbone.net[0][0]
    x = torch.randn(9, 5)
    factors = [next(iter(strategy.adapters.factors(n).values())) for n in strategy.adapters.adapters]
    a, b = torch.cat([f[0] for f in factors]), torch.cat([f[1] for f in factors], 1)
    expected = x @ layer.base_layer.weight.T + layer.base_layer.bias
    torch.testing.assert_close(layer(x), expected + 3 * x @ a.T @ b.T, atol=1e-5, rtol=1e-5)
    whole = layer.base_layer.weight + 3 * b @ a
    torch.testing.assert_close(layer(x), x @ whole.T + layer.base_layer.bias, atol=1e-5, rtol=1e-5)
    for name in strategy.adapters.adapters:
        strategy.adapters.merge(name)
    torch.testing.assert_close(layer(x), x @ whole.T + layer.base_layer.bias, atol=1e-5, rtol=1e-5)


def test_the_penalty_lowers_the_overlap(model, experiences, drive):
    found = []
    for weight in (0.0, 0.5):
        strategy = drive(make(model(), orthogonality=[weight], lr=0.01), experiences(2), epochs=10)
        found.append(strategy.measurements()["overlap"])
    assert found[1] < 0.7 * found[0]


def test_a_lost_past_is_noticed(model):
    strategy = grown(model(), 2)
    with torch.no_grad():
        next(iter(strategy.adapters.factors("task0").values()))[0].zero_()
    with pytest.raises(RuntimeError, match="past task is empty"):
        strategy.training_step((torch.randn(4, 5), torch.tensor([2, 3, 2, 3])), 0)


def test_memory_per_task(model):
    strategy = grown(model(hidden=(7, 6)), 2)
    added = sum(p.numel() for p in strategy.adapters.parameters_of("task1"))
    assert added == 2 * (5 + 7) + 2 * (7 + 6)


def test_resumes(experiences, model, resumes):
    for head in (Growing, Linear):
        assert resumes(lambda head=head: make(model(head), shrinkage=[0.1]), experiences())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"orthogonality": [-1.0]}, r"strategy.orthogonality: \[-1.0\] is out of range"),
        ({"shrinkage": []}, r"strategy.shrinkage: \[\] is out of range \(valid: one value ≥ 0 or more\)"),
        ({"penalty": "cube"}, r"strategy.penalty: 'cube' is out of range"),
    ],
)
def test_refuses_what_is_out_of_range(model, options, message):
    with pytest.raises(UserError, match=message):
        make(model(), **options)
