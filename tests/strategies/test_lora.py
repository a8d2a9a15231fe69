import numpy as np
import pytest
import torch
from torch import nn

from clplat.backbones.base import Backbone, Classifier
from clplat.backbones.heads import Growing, Linear
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError
from clplat.strategies.lora import SequentialLoRA


def make(net, **options):
    return SequentialLoRA(
        model=net, **{"where": "ffn", "rank": 2, "dropout": 0.0, "optimizer": "sgd", "lr": 0.05, **options}
    )


def update_by_hand(weights, scale, x, y, rate, adam):
    """A, B, head weight and head bias after one step of CE(head(relu((W + s B A) x + b))), in NumPy."""
    w, bias, a, b, c, d = weights
    pre = x @ (w + scale * b @ a).T + bias
    h = np.maximum(pre, 0)
    logits = h @ c.T + d
    p = np.exp(logits - logits.max(1, keepdims=True))
    error = (p / p.sum(1, keepdims=True) - np.eye(len(c))[y]) / len(x)
    g = ((error @ c) * (pre > 0)).T @ x  # (o, d)
    step = (lambda grad: grad / (np.abs(grad) + 1e-8)) if adam else (lambda grad: grad)
    gradients = (scale * b.T @ g, scale * g @ a.T, error.T @ h, error.sum(0))
    return [value - rate * step(grad) for value, grad in zip((a, b, c, d), gradients, strict=True)]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_first_update_and_inference_by_hand(model, experiences, optimizer):
    e = experiences(1)[0]
    net = model().double()
    strategy = make(net, optimizer=optimizer, alpha=6.0)
    strategy.grow(e)
    strategy.double()
    ((a, b),) = strategy.adapters.factors("shared").values()
    nn.init.normal_(b)  # else A has no gradient
    layer = net.backbone.net[0][0]
    parts = (layer.weight, layer.bias, a, b, net.head.weight, net.head.bias)
    before = [p.detach().numpy().copy() for p in parts]
    x, y = e.train.all()
    opt = strategy.configure_optimizers()
    strategy.training_step((x.double(), y), 0).backward()
    opt.step()
    after = update_by_hand(before, 3.0, x.double().numpy(), y.numpy(), 0.05, optimizer == "adamw")
    for mine, theirs in zip(parts[2:], after, strict=True):
        np.testing.assert_allclose(mine.detach().numpy(), theirs, atol=1e-9)
    w = before[0] + 3 * after[1] @ after[0]
    expected = np.maximum(x.double().numpy() @ w.T + before[1], 0) @ after[2].T + after[3]
    np.testing.assert_allclose(strategy.predict(x.double()).detach().numpy(), expected, atol=1e-9)


def test_a_new_adapter_changes_nothing(model, experiences):
    net = model()
    x = torch.randn(4, 5)
    before = net.features(x)
    strategy = make(net)
    strategy.grow(experiences(1)[0])
    assert torch.equal(net.features(x), before)


def test_one_adapter_learns_and_the_backbone_keeps_its_bits(model, experiences, drive):
    net = model(hidden=(7, 6))
    before = {n: p.detach().clone() for n, p in net.backbone.named_parameters()}
    strategy, found = make(net), []
    for e in experiences(3):
        drive(strategy, [e])
        found.append([p.detach().clone() for p in strategy.adapters.parameters_of("shared")])
    assert list(strategy.adapters.adapters) == ["shared"]
    assert all(not torch.equal(a, b) for a, b in zip(found[0], found[2], strict=True))
    after = {n.replace("base_layer.", ""): p for n, p in net.backbone.named_parameters() if ".lora_" not in n}
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n], after[n]) for n in before)
    trained = {n for n, p in strategy.model.named_parameters() if p.requires_grad}
    assert all(n.startswith("head.") or ".lora_" in n for n in trained)


def test_defaults_are_those_of_the_sequential_baseline(experiences):
    net = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=2, heads=2), Growing(8, 6))
    strategy = SequentialLoRA(model=net)
    strategy.grow(experiences(1)[0])
    assert strategy.adapters.layers == ("net.blocks.0.attn.qkv", "net.blocks.1.attn.qkv")  # fused, without proj
    wrapped = net.backbone.get_submodule(strategy.adapters.layers[0])
    assert (wrapped.r, wrapped.scaling, wrapped.lora_dropout["shared"].p) == ({"shared": 8}, {"shared": 4.0}, 0.1)
    group = strategy.configure_optimizers().param_groups[0]
    assert (group["lr"], group["weight_decay"]) == (1e-3, 0.0)


class Separate(Backbone):
    """Two layers with the names of a language model's, and one with none."""

    def __init__(self):
        super().__init__()
        self.embed_dim = 4
        self.q_proj, self.v_proj, self.o_proj, self.up = (nn.Linear(4, 4) for _ in range(4))

    @property
    def blocks(self):
        return [self]

    def role(self, name):
        return "ffn" if name == "up" else "attention"

    def features(self, inputs):
        return self.up(self.o_proj(self.q_proj(inputs) + self.v_proj(inputs)))


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"q_proj", "v_proj"}),
        ({"projections": []}, {"q_proj", "v_proj", "o_proj"}),
        ({"projections": ["output"], "where": "both"}, {"o_proj", "up"}),
    ],
)
def test_projections_that_are_adapted(options, names):
    strategy = SequentialLoRA(model=Classifier(Separate(), Linear(4, 2)), **options)
    assert set(strategy.adapters.layers) == names


def test_no_such_layers_are_refused(model):
    with pytest.raises(UserError, match="backbone: has no linear layers of role attention that are query or value"):
        SequentialLoRA(model=model())
    with pytest.raises(UserError, match=r"strategy.rank: 0 is out of range \(valid: ≥ 1\)"):
        make(model(), rank=0)


def test_resumes(experiences, model, resumes):
    for head in (Growing, Linear):
        assert resumes(lambda head=head: make(model(head)), experiences())
