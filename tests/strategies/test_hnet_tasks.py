"""HNET: tasks told apart and inferred, and targets of other kinds."""

from dataclasses import replace

import pytest
import torch
from small_hnet import SMALL, make, tensors

from clplat import Data, Experience, Kind
from clplat.backbones._weights import fit
from clplat.backbones.base import Classifier
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.heads import NCM, Growing, Linear
from clplat.backbones.vit import vit_micro
from clplat.components.generated import Target
from clplat.components.tasks import least_entropy
from clplat.errors import UserError
from clplat.strategies.dp_hnet import DPHNet
from clplat.strategies.hnet import HNet


@pytest.fixture
def experiences(experiences):
    """Those of all strategies, each a task of its own."""
    return lambda *a, **k: [replace(e, task=e.index) for e in experiences(*a, **k)]


# --- tasks, inference, other targets ----------------------------------------------------------------------------------


def test_predictions_of_a_task_follow_its_weights(experiences, model, drive):
    """Unchanged where ω_j is, whatever is learned after; and only over its own classes."""
    stream = experiences(2)
    strategy = drive(make(model, lr=1e-9), stream[:1]).eval()
    x = stream[0].train.all()[0]
    before, omega = strategy.predict(x, 0), strategy.model.omega(0)
    assert before[:, 2:].isneginf().all()
    assert before[:, :2].isfinite().all()
    drive(strategy, stream[1:])
    strategy.eval()
    assert not torch.equal(strategy.model.omega(1), omega)
    torch.testing.assert_close(strategy.model.omega(0), omega, atol=1e-5, rtol=0)
    torch.testing.assert_close(strategy.predict(x, 0)[:, :2], before[:, :2], atol=1e-5, rtol=0)
    assert strategy.predict(x, 1)[:, [0, 1, 4, 5]].isneginf().all()
    assert strategy.predict(x, 2).isneginf().all()  # a task not met


def test_least_entropy_finds_the_task():
    logits = torch.full((3, 2, 6), -torch.inf)
    logits[0, :, :2] = torch.tensor([[4.0, 0.0], [0.0, 0.0]])
    logits[1, :, 2:4] = torch.tensor([[0.0, 0.0], [0.0, 0.0]])  # uniform
    logits[2, :, 4:] = torch.tensor([[0.0, 1.0], [0.0, 300.0]])  # a softmax that underflows to exactly 0
    assert least_entropy(logits).tolist() == [0, 2]
    logits[2] = -torch.inf  # none of the answers to choose from
    assert least_entropy(logits)[1].item() in (0, 1)


@pytest.mark.parametrize("infer", ["entropy", "network"])
def test_tasks_are_inferred(experiences, model, drive, infer):
    stream = experiences(3)
    strategy = drive(make(model, optimizer="adam", lr=0.01, infer=infer, memory=20, replay_batch=6), stream, epochs=40)
    strategy.eval()
    if infer == "entropy":
        x = torch.randn(5, 5)
        each = torch.stack([strategy.predict(x, t)[:, 2 * t : 2 * t + 2] for t in range(3)])
        surest = torch.distributions.Categorical(logits=each).entropy().argmin(0)
        assert torch.equal(strategy.predict(x).argmax(1) // 2, surest)
    right = [(strategy.predict(x).argmax(1) == y).float().mean().item() for x, y in (e.train.all() for e in stream)]
    given = [
        (strategy.predict(x, e.task).argmax(1) == y).float().mean().item()
        for e, (x, y) in zip(stream, (e.train.all() for e in stream), strict=True)
    ]
    assert min(given) > 0.9
    assert sum(right) / 3 > (0.9 if infer == "network" else 1 / 3)


def test_samples_predict_alone(experiences, model, drive):
    for infer in ("entropy", "network"):
        strategy = drive(make(model, infer=infer, memory=12, replay_batch=4), experiences(3)).eval()
        x = torch.randn(9, 5)
        parts = torch.cat([strategy.predict(part) for part in x.split(2)])
        torch.testing.assert_close(parts, strategy.predict(x))


def image_experiences():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, 8, 8, generator=generator), torch.arange(24) % 4
    for t in range(2):
        rows = torch.arange(24)[y // 2 == t]
        yield Experience(t, f"e{t}", Kind.LEARN, Data(x + 3 * t, y, rows), classes=(2 * t, 2 * t + 1), task=t)


def test_batch_norm_statistics_are_each_task_s_own(drive):
    torch.manual_seed(0)
    stream = list(image_experiences())
    net = Classifier(slim_resnet18((3, 8, 8), width=2), Growing(16, 4))
    strategy = HNet(model=net, **{**SMALL, "chunk": 500}, lr=0.01)
    drive(strategy, stream[:1])
    first = tensors(strategy.model.statistics[0])
    assert first["model/backbone/bn1/running_mean"].any()
    drive(strategy, stream[1:])
    second = tensors(strategy.model.statistics[1])
    assert all(torch.equal(v, first[k]) for k, v in tensors(strategy.model.statistics[0]).items())
    assert not torch.equal(first["model/backbone/bn1/running_mean"], second["model/backbone/bn1/running_mean"])
    x = stream[0].train.all()[0]
    strategy.eval()
    strategy.predict(x, 0)
    assert all(torch.equal(v, first[k]) for k, v in tensors(strategy.model.statistics[0]).items())


def test_adapters_of_a_frozen_backbone_are_generated(drive):
    torch.manual_seed(0)
    stream = list(image_experiences())
    net = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=1, heads=2), Growing(8, 4))
    frozen = {k: v.detach().clone() for k, v in net.backbone.state_dict().items()}
    layers = net.backbone.layers("attention")
    strategy = HNet(model=net, **{**SMALL, "chunk": 50}, lr=0.05, rank=2)
    assert strategy.model.target.size == 4 * 8 + 4 + sum(2 * (v.in_features + v.out_features) for v in layers.values())
    drive(strategy, stream)
    after = strategy.model.target.model.backbone.state_dict()
    assert all(torch.equal(frozen[k], after[k]) for k in frozen)
    target, omega = strategy.model.target, strategy.model.omega(1)
    weights = target.weights(omega)
    name, layer = next(iter(layers.items()))
    starts = dict(zip((s.offset for s in target.slices), target.start.split(target._starts), strict=True))
    b, a = [s for s in target.slices if s.base == f"model.backbone.{name}.weight"]
    assert starts[b.offset].tolist() == [0]
    assert 0.5 < starts[a.offset].abs().max() * layer.in_features**0.5 <= 1
    delta = omega[b.offset : b.end].view(b.shape) @ (omega[a.offset : a.end] + starts[a.offset]).view(a.shape)
    torch.testing.assert_close(weights[f"model.backbone.{name}.weight"], layer.weight + delta)


@pytest.mark.parametrize("cls", [HNet, DPHNet])
def test_adapters_start_at_the_frozen_backbone_and_the_head_where_it_was(drive, cls):
    torch.manual_seed(0)
    stream = list(image_experiences())
    net = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=1, heads=2), Linear(8, 4))
    x = stream[0].train.all()[0]
    expected = net(x).detach()
    growth = {"grow_every": 1} if cls is DPHNet else {}
    strategy = cls(model=net, **{**SMALL, "hidden": [6] if cls is HNet else 6}, lr=0.05, rank=2, **growth)
    strategy.grow(stream[0])
    assert torch.equal(strategy.model(x)[:, :2], expected[:, :2])
    strategy.begin(stream[0])
    strategy.raw, strategy.global_batch = x, len(x)
    strategy.training_step(stream[0].train.all(), 0).backward()
    assert any(p.grad.any() for p in strategy.model.generator.parameters() if p.grad is not None)
    if growth:  # a new level starts there, too
        drive(strategy, stream[:1])
        strategy.grow(stream[1])
        assert torch.equal(strategy.model(x)[:, 2:], expected[:, 2:])


def test_weights_that_would_not_be_used_are_refused(tmp_path, model):
    read = model(head=Linear)
    with torch.no_grad():
        read.head.bias += 1
    for part, key in (("backbone", "start.run"), ("head", "start.head")):
        net = model(head=Linear)
        state = getattr(read, part).state_dict()
        fit(getattr(net, part), state, f"the {part} of runs/x", lambda _: False, key)
        message = rf"strategy.rank: 0 generates every weight, and would not use those of {key}: the {part} of runs/x \("
        with pytest.raises(UserError, match=message):
            make(lambda net=net: net)
    net = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=1, heads=2), Linear(8, 4))
    fit(net.head, {"weight": torch.ones(4, 8), "bias": torch.ones(4)}, "x", lambda _: False, "start.head")
    target = Target(net, 2)  # adapters beside them, and the head as it was read
    assert (target.weights(torch.zeros(target.size))["model.head.weight"] == 1).all()


def test_a_frozen_parameter_is_not_generated(model):
    net = model()
    net.backbone.requires_grad_(False)
    assert Target(net).size == 6 * 7 + 6


def test_a_head_without_weights_is_refused(model):
    with pytest.raises(UserError, match="head: a generated one has to predict by trained weights"):
        make(lambda: model(head=NCM))


def test_a_task_met_again_goes_on_with_its_embedding(experiences, model, drive):
    stream = experiences(2)
    again = Experience(2, "again", Kind.LEARN, stream[0].train, classes=(0, 1), task=0)
    strategy = drive(make(model), stream)
    drive(strategy, [again])
    assert len(strategy.model.codes) == 2
    assert strategy._old == [1]
    assert strategy.model.codes[0].requires_grad
