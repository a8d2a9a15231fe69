import copy
import math

import numpy as np
import pytest
import torch
from svd import effective, svd
from torch import nn

from clplat import Data, Experience, Kind
from clplat.adapters import split
from clplat.adapters.split import cosines, kept_rank
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing, Linear
from clplat.backbones.language_model import language_model
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError
from clplat.strategies.naive import Naive
from clplat.strategies.svd_orthogonal import SVDOrthogonal, normalized
from clplat.stream import Answers


@pytest.fixture
def adamw():
    return lambda parameters, **o: torch.optim.AdamW(parameters, lr=1e-2, **o)


# --- ranks ------------------------------------------------------------------------------------------------------------


def test_cosines_are_of_the_features_that_both_have():
    x, y = torch.tensor([[3.0, 4.0, 9.0]]), torch.tensor([[4.0, 3.0]])
    assert cosines(x, y).item() == pytest.approx(24 / 25)


def test_importances_have_mean_one():
    assert normalized(torch.tensor([0.2, 0.4, -0.3])).tolist() == pytest.approx([1.0, 2.0, 0.0])
    assert normalized(torch.tensor([-0.2, -0.1])).tolist() == [1.0, 1.0]


def test_ranks_follow_importance(model):
    strategy = SVDOrthogonal(model=model(hidden=(40, 30, 20), features=50))
    ranks = [40, 30, 20]
    kept = lambda: [kept_rank(*pair) for pair in zip(strategy._shares(), ranks, strict=True)]  # noqa: E731
    assert kept() == [math.floor(0.8 * r) for r in ranks]  # equal importances
    strategy.importance = [0.0, 1.0, 2.0]
    assert kept() == [4, 24, 20]  # 0.1 of 40; 0.8 of 30; 1.5 is cut to 1
    assert [kept_rank(f, 10) for f in (-0.5, 0, 0.31, 0.1 + 1 * (0.8 - 0.1), 1.7)] == [0, 0, 3, 8, 10]
    assert kept_rank(0.29, 100) == 29  # 0.29 · 100 is 28.999999999999996
    found = [kept_rank(0.1 + i / 10 * 0.7, 64) for i in range(30)]
    assert found == sorted(found)


@pytest.mark.parametrize(("ranks", "expected"), [("constant", [3, 3]), ("linear", [0, 2])])
def test_schedules(model, experiences, drive, ranks, expected):
    strategy = SVDOrthogonal(
        model=model(), ranks=ranks, target_retention=0.6, retention_per_task=0.2 + 1e-6, least_retention=0.0
    )
    kept = []
    drive(strategy, experiences(3), epochs=1, each_step=lambda s: kept.append(s.layers[0].kept))
    kept = [kept[i] for i in range(0, len(kept), len(kept) // 3)]
    assert kept[0] == 0
    assert kept[1:] == ([3, 3] if ranks == "constant" else [1, 2])
    assert strategy.facts["preserved_fraction"] == kept[2] / 5


def test_importance_is_that_of_the_experience_that_ended(model, experiences, drive):
    stream = experiences(2)
    strategy = SVDOrthogonal(model=model(hidden=(7, 6)), importance_samples=5, lr=1e-2)
    strategy.layers[0].weight.data[:5] += 2 * torch.eye(5)  # so that no cosine is negative
    strategy.layers[1].weight.data.abs_()
    drive(strategy, stream[:1])
    x = stream[0].train.all()[0][torch.arange(5) * 24 // 5].double()
    first, second = (layer.weight.detach().double() for layer in strategy.layers)
    hidden = (x @ first.T + strategy.layers[0].bias.double()).relu()
    raw = []
    for given, weight in ((x, first), (hidden, second)):
        out, n = given @ weight.T, min(weight.shape)
        a, b = given[:, :n], out[:, :n]
        raw.append(((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1)).clamp(min=1e-12)).mean())
    expected = torch.stack(raw)
    assert (expected > 0.01).all()
    torch.testing.assert_close(
        torch.tensor(strategy.importance, dtype=torch.float64), expected / expected.mean(), atol=1e-6, rtol=1e-6
    )
    assert strategy.training  # the modes are as they were, and no hook is left
    assert not any(layer._forward_pre_hooks for layer in strategy.layers)


# --- the strategy -----------------------------------------------------------------------------------------------------


def test_the_first_experience_is_fine_tuning(model, experiences, drive):
    stream = experiences(1)
    mine = drive(SVDOrthogonal(model=model(), optimizer="adamw", lr=1e-2), stream)
    plain = drive(Naive(model=model(), optimizer="adamw", lr=1e-2), stream)
    state = mine.model.state_dict()
    assert all(torch.equal(state[k], v) for k, v in plain.model.state_dict().items())


def update_by_hand(weights, x, y, k, rate, adam):
    """Weights after one step, in NumPy: from dL/dW of CE(head(relu(W x + b))) by the chain rule."""
    w, b, c, d = weights
    pre = x @ w.T + b
    h = np.maximum(pre, 0)
    logits = h @ c.T + d
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    error = (p - np.eye(len(c))[y]) / len(x)
    g = ((error @ c) * (pre > 0)).T @ x  # (o, d)
    uh, sh, vh, ul, sl, vl = svd(torch.from_numpy(w), k)
    du, dv, ds = g @ vl * sl, g.T @ ul * sl, np.diag(ul.T @ g @ vl)
    du, dv = du - uh @ (uh.T @ du), dv - vh @ (vh.T @ dv)
    step = (lambda grad: grad / (np.abs(grad) + 1e-8)) if adam else (lambda grad: grad)  # Adam's first step
    ul, vl, sl = ul - rate * step(du), vl - rate * step(dv), sl - rate * step(ds)
    ul, vl = ul - uh @ (uh.T @ ul), vl - vh @ (vh.T @ vl)
    after = (uh * sh) @ vh.T + (ul * sl) @ vl.T
    return after, b, c - rate * step(error.T @ h), d - rate * step(error.sum(0))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("width", [4, 5, 7])
def test_first_update_and_inference_by_hand(model, experiences, optimizer, width):
    stream = experiences(2)
    net = model(hidden=(width,)).double()
    strategy = SVDOrthogonal(model=net, optimizer=optimizer, lr=0.01, ranks="constant", target_retention=0.6)
    strategy.grow(stream[0])
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    layer, head = strategy.layers[0], net.head
    weights = [t.detach().numpy().copy() for t in (effective(layer), layer.bias, head.weight, head.bias)]
    x, y = stream[1].train.all()
    optimizer_ = strategy.configure_optimizers()
    strategy.training_step((x.double(), y), 0).backward()
    strategy.on_after_backward()
    optimizer_.step()
    strategy.after_step()
    strategy.end(stream[1])
    k = kept_rank(0.6, min(width, 5))
    w, b, c, d = update_by_hand(weights, x.double().numpy(), y.numpy(), k, 0.01, optimizer == "adamw")
    np.testing.assert_allclose(layer.weight.detach().numpy(), w, atol=1e-9)
    np.testing.assert_allclose(head.weight.detach().numpy(), c, atol=1e-9)
    expected = np.maximum(x.double().numpy() @ w.T + b, 0) @ c.T + d
    np.testing.assert_allclose(strategy.predict(x.double()).detach().numpy(), expected, atol=1e-9)


def test_only_the_factors_and_the_head_learn_later(model, experiences):
    stream = experiences(2)
    for rest, learning in (("none", set()), ("norms", {"bias"}), ("all", {"bias"})):
        strategy = SVDOrthogonal(model=model(), train_rest=rest)
        strategy.grow(stream[0])
        strategy.begin(stream[0])
        assert all(p.requires_grad for p in strategy.parameters() if p.numel())
        strategy.grow(stream[1])
        strategy.begin(stream[1])
        named = strategy.model.backbone.named_parameters()
        assert {n.rpartition(".")[2] for n, p in named if p.requires_grad} == {"left", "scale", "right"} | learning
        assert all(p.requires_grad for p in strategy.model.head.parameters())
    images = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=1, heads=2), Growing(8, 4))
    for rest, count in (("none", 0), ("norms", 11), ("all", 13)):  # 6 of norms, 5 biases; positions, patches
        strategy = SVDOrthogonal(model=copy.deepcopy(images), train_rest=rest)
        strategy._met = 2
        strategy.begin(stream[1])
        named = dict(strategy.model.backbone.named_parameters())
        factors = [n for n in named if n.rpartition(".")[2] in ("left", "scale", "right")]
        assert len(factors) == 3 * 4
        assert sum(p.requires_grad for n, p in named.items() if n not in factors) == count, rest


def test_what_the_user_froze_is_neither_split_nor_trained(model, experiences, drive):
    net = model(hidden=(7, 6))
    first, second = net.backbone.layers("ffn").values()
    first.weight.requires_grad_(False)
    second.bias.requires_grad_(False)
    frozen = first.weight.clone(), second.bias.clone()
    strategy = drive(SVDOrthogonal(model=net, lr=1e-2, train_rest="all"), experiences(3))
    assert len(strategy.layers) == 1
    assert torch.equal(frozen[0], first.weight)
    assert torch.equal(frozen[1], second.bias)


@pytest.mark.parametrize("block", ["factored", "paper"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_task_leaves_the_protected_block(model, experiences, drive, block, optimizer):
    """Through the hooks as the loop calls them, with weight decay, momentum and clipping."""
    stream = experiences(2)
    options = {"momentum": 0.9} if optimizer == "sgd" else {}
    strategy = SVDOrthogonal(
        model=model(), block=block, optimizer=optimizer, lr=0.02, weight_decay=0.1, ranks="constant", **options
    )
    drive(strategy, stream[:1])
    layer = strategy.layers[0]
    before = layer.weight.detach().clone()
    drive(strategy, stream[1:], epochs=5, clip=1.0, accumulate=2)
    uh, _, vh, *_ = (torch.from_numpy(t).float() for t in svd(before, 4))
    change = (layer.weight - before).detach()
    assert change.norm() > 1e-2
    assert (uh.T @ change @ vh).abs().max() < 1e-5
    assert ((uh.T @ change).abs().max() < 1e-5) == (block == "factored")
    assert ((change @ vh).abs().max() < 1e-5) == (block == "factored")


def test_factors_move(model, experiences, drive):
    stream, found = experiences(2), []
    strategy = drive(SVDOrthogonal(model=model(), optimizer="sgd", lr=0.1, ranks="constant"), stream[:1])

    def note(s):
        found.append([p.detach().clone() for p in (s.layers[0].left, s.layers[0].scale, s.layers[0].right)])

    drive(strategy, stream[1:], each_step=note)
    assert all(not torch.equal(a, b) for a, b in zip(found[0], found[-1], strict=True))


def test_gap_is_logged(model, experiences, drive):
    strategy = drive(SVDOrthogonal(model=model(), ranks="constant", target_retention=0.4), experiences(1))
    s = np.linalg.svd(strategy.layers[0].weight.detach().double().numpy())[1]
    drive(strategy, experiences(2)[1:])
    assert strategy.measurements()["smallest_gap"] == pytest.approx((s[1] - s[2]) / s[0], abs=1e-5)
    assert strategy.measurements()["preserved_fraction"] == 2 / 5


@pytest.mark.parametrize("options", [{}, {"block": "paper"}, {"ranks": "linear", "train_rest": "norms"}])
def test_resumes(experiences, model, resumes, options):
    for head in (Growing, Linear):
        make = lambda head=head: SVDOrthogonal(model=model(head, hidden=(7, 6)), lr=0.01, **options)  # noqa: E731
        assert resumes(make, experiences())


def test_importance_is_of_a_decoder_too(monkeypatch):
    answers = Answers(torch.tensor([[5, 1], [6, 1]]), end=1, vocabulary=30, new_tokens=0)
    backbone = language_model((2, 9), family="t5", dim=16, depth=1, heads=2, vocabulary=30)
    strategy = SVDOrthogonal(model=backbone.assemble(None, answers))
    inputs = torch.full((4, 2, 9), -1, dtype=torch.int32)
    inputs[:, 0, :5] = torch.arange(20).view(4, 5) + 2
    data = Data(inputs, torch.tensor([0, 1, 0, 1]))
    monkeypatch.setattr(split, "cosines", lambda x, y: torch.ones(1))
    strategy.end(Experience(index=0, name="a", kind=Kind.LEARN, train=data))
    assert len(strategy.importance) == len(backbone.layers("attention")) + len(backbone.layers("ffn")) > 10
    assert set(strategy.importance) == {1.0}  # every layer met the samples once


def test_importance_is_in_the_state(model):
    first, second = (SVDOrthogonal(model=model(hidden=(7, 6))) for _ in range(2))
    first.importance = [0.25, 1.75]
    second.load_state_dict(first.state_dict())
    assert second.importance == [0.25, 1.75]


def test_weights_of_a_model_that_was_never_split_load(model):
    strategy, plain = SVDOrthogonal(model=model()), model(seed=3)
    strategy.model.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(strategy.layers[0].weight, plain.backbone.layers("ffn")["net.0.0"].weight)


def test_layers_that_are_not_called_are_refused():
    class Bypassed(nn.Linear):
        pass

    net = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=1, heads=2), Growing(8, 4))
    net.backbone.net.blocks[0].attn.proj = Bypassed(8, 8)
    with pytest.raises(UserError, match=r"strategy.roles: net.blocks.0.attn.proj is a Bypassed; only plain"):
        SVDOrthogonal(model=net)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"least_retention": 1.5}, r"strategy.least_retention: 1.5 is out of range \(valid: in \[0, 1\]\)"),
        ({"roles": ["attention"]}, r"strategy.roles: \['attention'\] is out of range"),
        ({"importance_samples": 0}, r"strategy.importance_samples: 0 is out of range"),
        ({"block": "dense"}, r"strategy.block: 'dense' is out of range \(valid: factored or paper\)"),
    ],
)
def test_refuses_what_is_out_of_range(model, options, message):
    with pytest.raises(UserError, match=message):
        SVDOrthogonal(model=model(), **options)
