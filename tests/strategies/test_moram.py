import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clplat import Experience, Kind
from clplat.adapters.atoms import AtomLinear, activations
from clplat.backbones.heads import Growing, Linear
from clplat.config import discovery
from clplat.errors import UserError
from clplat.strategies.moram import MoRAM, across_batch


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


# --- the layer --------------------------------------------------------------------------------------------------------


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


# --- the strategy -----------------------------------------------------------------------------------------------------


def strategy_of(model, **options):
    return MoRAM(
        model=model, **{"rank": 3, "top": 4, "lr": 0.05, "optimizer": "sgd", "schedule": "constant", **options}
    )


def test_defaults_are_those_of_the_authors_script(model):
    strategy = MoRAM(model=model())
    one = strategy._layers[0]
    strategy.grow(Experience(0, "a", Kind.LEARN, None, classes=(0, 1)))
    assert (one.top, one.temperature, one.threshold, one.dropout, len(one.new_keys)) == (16, 0.01, 0.2, 0.0, 16)
    assert not strategy.text_loss
    assert MoRAM(model=prompts(model)).text_loss  # CLIP's loss has it
    group = strategy.configure_optimizers().param_groups[0]
    assert (group["lr"], group["betas"], group["weight_decay"]) == (5e-4, (0.9, 0.9999), 0.0)
    assert strategy.schedule == "cosine"


def update_by_hand(net, one, x, y, others, rate):
    """New keys and values after one SGD step, by autograd in double precision over the equations as written."""
    keys, values = (t.detach().clone().requires_grad_() for t in (one.new_keys, one.new_values))
    p = x @ torch.cat([one.keys, keys]).T
    s = p / p.norm(dim=1, keepdim=True)
    kth = s.detach().sort(1, descending=True).values[:, [3]]
    e = torch.where(s.detach() >= kth, torch.exp(s / 0.1), 0.0)
    w = e / e.sum(1, keepdim=True)
    hidden = (x @ one.weight.T + one.bias + (w * p) @ torch.cat([one.values, values], 1).T).relu()
    logits = hidden @ net.head.weight.T + net.head.bias
    own = [c for c in range(logits.shape[1]) if c not in others]
    logs = logits - logits[:, own].exp().sum(1, keepdim=True).log()
    (-logs[torch.arange(len(y)), y].mean()).backward()
    return keys.detach() - rate * keys.grad, values.detach() - rate * values.grad


def test_first_update_by_hand(model, experiences, drive):
    stream = experiences(2)
    strategy = drive(strategy_of(model(), temperature=0.1), stream[:1])
    strategy.double().grow(stream[1])
    one = strategy._layers[0]
    with torch.no_grad():
        one.new_values.normal_(generator=torch.Generator().manual_seed(4))  # else the keys' gradient is 0
    x, y = stream[1].train.all()
    expected = update_by_hand(strategy.model, one, x.double(), y, [0, 1], 0.05)
    optimizer = strategy.configure_optimizers()
    strategy.training_step((x.double(), y), 0).backward()
    optimizer.step()
    torch.testing.assert_close(one.new_keys.detach(), expected[0], atol=1e-9, rtol=0)
    torch.testing.assert_close(one.new_values.detach(), expected[1], atol=1e-9, rtol=0)


def test_the_bank_grows_and_old_atoms_keep_their_bits(model, experiences, drive):
    stream, before = experiences(3), None
    strategy = strategy_of(model())
    backbone = [layer.weight.clone() for layer in strategy._layers]
    for t, e in enumerate(stream, 1):
        drive(strategy, [e])
        one = strategy._layers[0]
        assert len(bank(one)[0]) == 3 * t
        assert strategy.measurements() == {"atoms": 3 * t}
        assert one.new_values.abs().sum() > 0
        if before is not None:
            assert torch.equal(one.keys, before[0])
            assert torch.equal(one.values, before[1])
        before = bank(one)
    assert all(torch.equal(a, layer.weight) for a, layer in zip(backbone, strategy._layers, strict=True))
    assert not any(p.requires_grad for n, p in strategy.model.backbone.named_parameters() if ".new_" not in n)


def test_outputs_after_a_task_are_those_of_its_atoms(model, experiences, drive):
    """Evaluation comes before the next task's atoms, which would change it."""
    stream = experiences(2)
    strategy = drive(strategy_of(model()), stream[:1]).eval()
    x = stream[0].train.all()[0]
    with torch.no_grad():
        before = strategy.predict(x)
        strategy.grow(stream[1])
        assert not torch.allclose(strategy.predict(x)[:, :2], before, atol=1e-5)


def test_only_own_classes_compete(model, experiences, drive):
    stream = experiences(2)
    for own in (True, False):
        strategy = drive(strategy_of(model(), own_classes=own), stream[:1])
        old = strategy.model.head.weight[:2].clone()
        drive(strategy, stream[1:])
        assert torch.equal(strategy.model.head.weight[:2], old) == own


def test_classes_to_come_do_not_compete_either(model, experiences, drive):
    """In a head that has rows for all classes from the start: the loss, and the rows, by hand."""
    stream = experiences(3)
    strategy = strategy_of(model(Linear))
    before = strategy.model.head.weight.clone()
    strategy.grow(stream[0])
    x, y = stream[0].train.all()
    logits = strategy.model(x)[:, :2]
    assert strategy.training_step((x, y), 0).item() == pytest.approx(F.cross_entropy(logits, y).item(), abs=1e-5)
    drive(strategy, stream[:2])
    after = strategy.model.head.weight
    assert torch.equal(after[4:], before[4:])
    assert not torch.equal(after[2:4], before[2:4])
    drive(strategy_of(net := model(Linear), own_classes=False), stream[:1])
    assert not torch.equal(net.head.weight[4:], before[4:])


def test_cross_entropy_over_the_batch_by_hand():
    logits, labels = torch.tensor([[1.0, 2.0, 0.0], [0.5, 1.0, 7.0]]), torch.tensor([1, 1])
    logs = [2 - math.log(math.exp(2) + math.exp(1)), 1 - math.log(math.exp(2) + math.exp(1))]
    assert across_batch(logits, labels, 3).item() == pytest.approx(-sum(logs) / 3)


@pytest.mark.parametrize("head", [Growing, Linear])
def test_text_loss_is_added(model, experiences, head):
    """The mean over the two classes met, though a head may have six rows."""
    stream = experiences(1)
    x, y = stream[0].train.all()
    found = []
    for text in (False, True):
        strategy = strategy_of(model(head), text_loss=text)
        torch.manual_seed(0)
        strategy.grow(stream[0])
        found.append(strategy.training_step((x, y), 0))
    expected = -strategy.model(x).log_softmax(0)[torch.arange(len(y)), y].sum() / 2
    assert (found[1] - found[0]).item() == pytest.approx(expected.item(), abs=1e-5)


def test_a_model_with_a_loss_of_its_own_is_asked_for_it(model, experiences):
    stream = experiences(2)
    net = model()
    net.losses = lambda inputs, labels: labels.double() + 0 * net(inputs).sum(1)
    strategy = strategy_of(net)
    for e in stream:
        strategy.grow(e)
    x, y = stream[1].train.all()
    assert strategy.training_step((x, y), 0).item() == y.double().mean().item()


def test_memory_per_task(model):
    strategy = strategy_of(model(hidden=(7, 6)))
    strategy.grow(Experience(0, "a", Kind.LEARN, None, classes=(0, 1)))
    added = sum(p.numel() for layer in strategy._layers for p in (layer.new_keys, layer.new_values))
    assert added == 3 * (7 + 5) + 3 * (6 + 7)


def test_layers_that_are_not_called_are_refused(model):
    class Bypassed(nn.Linear):
        pass

    net = model()
    net.backbone.net[0][0] = Bypassed(5, 7)
    with pytest.raises(UserError, match=r"strategy.roles: net.0.0 is a Bypassed; only plain linear layers serve"):
        strategy_of(net)


def test_alias():
    assert discovery.find("strategies", "mora").name == "moram"
    assert "mora" not in discovery.entries("strategies")


def test_resumes(experiences, model, resumes):
    for head in (Growing, Linear):
        assert resumes(lambda head=head: strategy_of(model(head)), experiences())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, r"strategy.rank: 0 is out of range \(valid: ≥ 1\)"),
        ({"top": 1}, r"strategy.top: 1 is out of range \(valid: ≥ 2\)"),
        ({"temperature": 0.0}, r"strategy.temperature: 0.0 is out of range"),
        ({"roles": ["attention"]}, r"strategy.roles: \['attention'\] is out of range"),
    ],
)
def test_refuses_what_is_out_of_range(model, options, message):
    with pytest.raises(UserError, match=message):
        MoRAM(model=model(), **options)


def prompts(model):
    """A model that has a prompt for each class, and so a loss of its own."""
    net = model()
    net.losses = lambda inputs, labels: 1 / 0
    net.among = lambda inputs, classes: net(inputs)[:, classes]
    return net


def test_both_losses_of_a_model_with_prompts(model, experiences):
    stream = experiences(2)
    strategy = strategy_of(prompts(model), text_loss=True)
    for e in stream:
        strategy.grow(e)
    x, y = stream[1].train.all()
    logits = strategy.model(x)[:, [2, 3]]
    text = -sum(logits.log_softmax(0)[i, c - 2] for i, c in enumerate(y.tolist())) / 4  # two classes met before count
    found = strategy.training_step((x, y), 0).item()
    assert found == pytest.approx((F.cross_entropy(logits, y - 2) + text).item(), abs=1e-5)


def test_no_text_loss_where_answers_are_text(model):
    net = model()
    net.losses = lambda inputs, labels: net(inputs)
    with pytest.raises(UserError, match="text_loss"):
        strategy_of(net, text_loss=True)
