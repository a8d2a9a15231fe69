import copy
import math

import pytest
import torch
import torch.nn.functional as F

from clplat.backbones.base import Classifier
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.heads import NCM, Cosine, Growing, Linear, Masked, Taskwise
from clplat.backbones.vit import vit_micro
from clplat.components.losses import contrast
from clplat.errors import UserError
from clplat.strategies.coact import CoACT

DIM, DEPTH = 16, 2


def net(head=Growing):
    torch.manual_seed(0)
    backbone = vit_micro((3, 8, 8), patch_size=4, dim=DIM, depth=DEPTH, heads=2)
    return Classifier(backbone, head(DIM, 6))


def make(head=Growing, **options):
    own = {"rank": 2, "dropout": 0.0, "projections": ["query", "value"], "lr": 0.05, "later_rate": 1.0}
    strategy = CoACT(model=net(head), **{**own, **options})
    strategy._prepare = lambda raw, augmented: raw + (0.1 * torch.randn_like(raw) if augmented else 0.0)
    return strategy


@pytest.fixture
def stream(experiences):
    return experiences(3, per_class=5, features=3 * 8 * 8)


@pytest.fixture(autouse=True)
def _as_images(monkeypatch):
    """Vectors of the small streams as images."""
    inner = vit_micro.__globals__["ViT"].features
    monkeypatch.setattr(vit_micro.__globals__["ViT"], "features", lambda self, x: inner(self, x.view(-1, 3, 8, 8)))


def plain(module):
    """Weights without adapters, by their plain names."""
    kept = {n: p for n, p in module.named_parameters() if ".lora_" not in n}
    return {n.replace(".base_layer.", "."): p.detach().clone() for n, p in kept.items()}


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


# --- the contrastive loss ---------------------------------------------------------------------------------------------


def some(samples, views):
    draw = torch.Generator().manual_seed(0)
    return F.normalize(torch.randn(samples, views, 5, dtype=torch.float64, generator=draw), dim=2)


@pytest.mark.parametrize("views", [2, 3])
def test_contrast_by_a_loop(views):
    z, y, found = some(4, views), torch.tensor([1, 0, 1, 2]), []
    places = [(b, v) for b in range(4) for v in range(views)]
    for i in places:
        rest = [a for a in places if a != i]
        scores = {a: (z[i] @ z[a]).item() / 0.3 for a in rest}
        whole = math.log(sum(math.exp(s) for s in scores.values()))
        positive = [a for a in rest if y[a[0]] == y[i[0]]]
        found.append(-sum(scores[a] - whole for a in positive) / len(positive))
    torch.testing.assert_close(contrast(z.transpose(0, 1), 0.3, y).item(), sum(found) / len(found))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(contrast(z[order].transpose(0, 1), 0.3, y[order]), contrast(z.transpose(0, 1), 0.3, y))


def test_with_labels_that_all_differ_it_is_that_of_pairs():
    z = some(4, 2)
    both = torch.cat([z[:, 0], z[:, 1]])
    scores = (both @ both.T / 0.5).fill_diagonal_(-torch.inf)
    expected = F.cross_entropy(scores, torch.arange(8).roll(4))
    torch.testing.assert_close(contrast(z.transpose(0, 1), 0.5, torch.arange(4)), expected)


# --- the first session ------------------------------------------------------------------------------------------------


def test_new_rows_are_means_and_others_stay(stream):
    strategy = make()
    for k, e in enumerate(stream):
        strategy.grow(e)
        before = strategy.model.head.weight.detach().clone()
        strategy.begin(e)
        x, y = e.train.all()
        with torch.no_grad():
            features = strategy.eval().model.features(x)
        head = strategy.model.head
        for c in e.classes:
            torch.testing.assert_close(head.weight[c], features[y == c].mean(0))
        assert torch.equal(head.weight[: 2 * k], before[: 2 * k])
        assert not head.bias.any()
        assert not head.bias.requires_grad
        strategy.train()
    with torch.no_grad():
        strategy.model.head.weight.add_(1)
    strategy.grow(stream[0])
    strategy.begin(stream[0])  # nothing is new: nothing is set
    assert torch.equal(strategy.model.head.weight[:2], before[:2] + 1)


def first(strategy, e):
    strategy.grow(e)
    strategy.begin(e)
    x, y = e.train.all()
    strategy.raw, strategy.global_batch = x, len(x)
    return x, y


def test_loss_of_the_first_session_by_hand(stream):
    strategy = make(temperature=0.2)
    x, y = first(strategy, stream[0])
    with torch.no_grad():
        for p in strategy.adapters.parameters_of("shared"):
            p.add_(0.1)
    torch.manual_seed(3)
    loss = strategy.training_step((x, y), 0)
    torch.manual_seed(3)
    other = strategy.prepare(x)
    f = strategy.model.features(x)
    slow = net().backbone.eval()(other)  # as pretrained, without adapters, of the other view
    z = torch.stack([F.normalize(f, dim=1), F.normalize(slow, dim=1)])
    torch.testing.assert_close(loss, F.cross_entropy(f @ strategy.model.head.weight.T, y) + contrast(z, 0.2, y))


def test_without_a_block_that_learns_the_teacher_stays_as_pretrained(stream, drive):
    strategy = make(slow_decay=0.5)
    start = plain(strategy.model.backbone)
    drive(strategy, stream[:1])
    assert same(plain(strategy.slow.model), start)
    assert same(plain(strategy.model.backbone), start)
    assert all(b.any() for _, b in strategy.adapters.factors("shared").values())


def test_blocks_learn_from_an_epoch_on_and_the_teacher_follows(stream, drive):
    strategy, trail = make(unfreeze=1, unfreeze_epoch=1, slow_decay=0.75, unfreeze_rate=0.1), []
    start = plain(strategy.model.backbone)

    def noting(s):
        trail.append((plain(s.model.backbone), plain(s.slow.model)))

    drive(strategy, stream[:1], batch=5, epochs=2, each_step=noting)
    assert len(trail) == 4
    assert same(trail[1][0], start)
    slow = {n: p.clone() for n, p in start.items()}
    for fast, found in trail:
        slow = {n: p + 0.25 * (fast[n] - p) for n, p in slow.items()}
        assert all(torch.allclose(found[n], p, atol=1e-6) for n, p in slow.items())
    moved = {n for n, p in trail[3][0].items() if not torch.equal(p, start[n])}
    assert moved
    assert all(n.startswith("net.blocks.1.") for n in moved)
    drive(strategy, stream[1:2], epochs=1)
    assert same(plain(strategy.model.backbone), trail[3][0])
    assert same(plain(strategy.slow.model), trail[3][1])


def test_what_the_user_froze_does_not_learn(stream, drive):
    model = net()
    frozen = model.backbone.blocks[1].mlp.fc1.weight.requires_grad_(False)
    before = frozen.detach().clone()
    strategy = CoACT(model=model, unfreeze=1, projections=[])
    assert strategy._late
    drive(strategy, stream[:1])
    assert torch.equal(frozen, before)


def test_rates(stream):
    strategy = make(unfreeze=0, unfreeze_rate=0.1, later_rate=0.3)
    strategy.grow(stream[0])
    first, late = strategy.configure_optimizers().param_groups
    assert [first["lr"], late["lr"]] == [0.05, pytest.approx(0.005)]
    assert {id(p) for p in late["params"]} == {id(p) for p in strategy._late}
    assert not {id(p) for p in first["params"]} & {id(p) for p in strategy._late}
    strategy.grow(stream[1])
    first, late = strategy.configure_optimizers().param_groups
    assert first["lr"] == pytest.approx(0.015)
    assert late["params"] == []


# --- later sessions ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [Growing, Linear, Masked])
def test_loss_of_a_later_session_by_hand(head, stream, drive):
    strategy = make(head, unfreeze=1, slow_decay=0.5, temperature=0.2, unfreeze_rate=1.0)
    drive(strategy, stream[:1])
    base = copy.deepcopy(strategy)
    x, y = first(strategy, stream[1])
    old = base.eval().model(x).detach()
    torch.testing.assert_close(strategy.model(x)[:, :2], old[:, :2])  # before a step old classes are as they were
    with torch.no_grad():
        for p in strategy.adapters.parameters_of("shared"):
            p.add_(0.1)
    torch.manual_seed(3)
    loss = strategy.training_step((x, y), 0)
    torch.manual_seed(3)
    other = strategy.prepare(x)
    f, logits = strategy.model.features(x), strategy.model(x)
    views = [f, base.slow.model(other), net().backbone.eval()(other)]
    assert not torch.allclose(views[1], views[2])
    known = old.isfinite().all(0)
    expected = F.cross_entropy(logits, y) + F.mse_loss(logits[:, : len(known)][:, known], old[:, known])
    expected = expected + contrast(torch.stack([F.normalize(v, dim=1) for v in views]), 0.2, y)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("later", ["classifier", "adapters", "both"])
def test_what_learns_later(later, stream, drive):
    strategy = drive(make(later=later, unfreeze=1), stream[:1])
    start, factors = plain(strategy.model), [p.detach().clone() for p in strategy.adapters.parameters_of("shared")]
    drive(strategy, stream[1:2], epochs=1)
    now = plain(strategy.model)
    moved = {n for n in start if not torch.equal(now[n][: len(start[n])], start[n])}
    assert moved == (set() if later == "adapters" else {"head.weight"})
    stay = [torch.equal(p, q) for p, q in zip(factors, strategy.adapters.parameters_of("shared"), strict=True)]
    assert all(stay) if later == "classifier" else not any(stay)
    drive(strategy, stream[2:], epochs=1)
    assert same(plain(strategy.first.model), start)  # as the first session left it, still


def test_later_epochs_have_no_step(stream, drive):
    strategy = drive(make(), stream[:1])
    x, y = first(strategy, stream[1])
    assert strategy.training_step((x, y), 0) is not None
    assert strategy.training_step((x, y), 1) is not None
    assert strategy.training_step((x, y), 0) is None
    none = drive(make(later_epochs=0), stream[:1])
    x, y = first(none, stream[1])
    assert none.training_step((x, y), 0) is None


def test_resumes(stream, resumes):
    assert resumes(lambda: make(unfreeze=1, later_epochs=2), stream)


def test_refuses_what_it_cannot_do():
    for head in (Taskwise, NCM, Cosine):
        with pytest.raises(
            UserError, match=f"head: {head.__name__.lower()} does not predict by one row a class, to be"
        ):
            make(head)
    wrong = {"unfreeze": 2, "unfreeze_epoch": -1, "unfreeze_rate": 0, "slow_decay": 2, "temperature": 0, "later": "all"}
    for option, value in {**wrong, "later_epochs": -1, "later_rate": 0}.items():
        with pytest.raises(UserError, match=rf"strategy.{option}: {value!r} is out of range"):
            make(**{option: value})
    with pytest.raises(UserError, match="its layers are convolutions"):
        CoACT(model=Classifier(slim_resnet18((3, 8, 8), width=2), Growing(16, 2)))
