import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clplat import Experience, Kind
from clplat.backbones.heads import Growing, Linear
from clplat.config import discovery
from clplat.errors import UserError
from clplat.strategies.moram import MoRAM, across_batch


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
        assert len(one.keys) + len(one.new_keys) == 3 * t
        assert strategy.measurements() == {"atoms": 3 * t}
        assert one.new_values.abs().sum() > 0
        if before is not None:
            assert torch.equal(one.keys, before[0])
            assert torch.equal(one.values, before[1])
        before = torch.cat([one.keys, one.new_keys]), torch.cat([one.values, one.new_values], 1)
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
