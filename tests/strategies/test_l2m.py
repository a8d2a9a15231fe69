"""L2M: the pool changes nothing at first, each sample takes one slot, and selection, penalty and loss by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clplat import Experience, Kind
from clplat.adapters.pool import PooledLinear
from clplat.backbones.base import Classifier
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.heads import Growing
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError
from clplat.strategies.l2m import L2M

D, B, P = 8, 6, 5
SAMPLES = torch.rand(B, 1, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def made(**options):
    torch.manual_seed(0)
    backbone = vit_micro((1, 8, 8), patch_size=4, dim=D, depth=2, heads=2)
    strategy = L2M(model=Classifier(backbone, Growing(D, 6)), **({"pool": P, "rank": 2} | options)).double()
    learning(strategy, 0)
    return strategy


def learning(strategy, t):
    experience = Experience(t, f"e{t}", Kind.LEARN, None, classes=(2 * t, 2 * t + 1))
    strategy.grow(experience)
    strategy.double()
    strategy.begin(experience)
    strategy.train()


def filled(strategy):
    """With changes that are none of them zero, and keys at the queries of some samples, which differ little."""
    with torch.no_grad():
        strategy.keys[:4] = queries(strategy, SAMPLES[:4])[: len(strategy.keys)]
    strategy.train()
    for layer in strategy.pool.layers:
        torch.nn.init.normal_(layer.b, std=0.1)
    return strategy


@pytest.fixture
def x():
    return SAMPLES.clone()


def queries(strategy, x):
    with strategy.pool.resting(), torch.no_grad():
        return strategy.eval().model.backbone(x)


def chosen(strategy, x):
    with strategy.pool.resting():
        return strategy._choose(x)


def test_a_new_pool_changes_no_output_and_first_steps_reach_b_alone(x):
    strategy = made()
    before = {n: p.clone() for n, p in strategy.model.backbone.named_parameters() if not p.requires_grad}
    with strategy.pool.resting():
        plain = strategy.eval().model(x)
    assert torch.equal(strategy.model(x), plain)
    strategy.train().training_step((x, torch.arange(B) % 2), 0).backward()
    for layer in strategy.pool.layers:
        assert not layer.a.grad.any()
        assert layer.b.grad.any()
    trained = {n.rpartition(".")[2] for n, p in strategy.model.backbone.named_parameters() if p.requires_grad}
    assert trained == {"a", "b"}
    assert all(p.grad is None for n, p in strategy.model.backbone.named_parameters() if n in before)


def test_samples_take_the_slot_of_the_nearest_key_whatever_its_length(x):
    strategy = filled(made())
    q, keys = queries(strategy, x).numpy(), strategy.keys.detach().numpy()
    nearest = [max(range(P), key=lambda p: q[b] @ keys[p] / np.linalg.norm(keys[p])) for b in range(B)]
    assert len(set(nearest)) > 1
    assert chosen(strategy.eval(), x).tolist() == nearest
    with torch.no_grad():
        strategy.keys *= torch.linspace(0.1, 9, P).double()[:, None]
    assert chosen(strategy, x).tolist() == nearest


def test_a_batch_of_several_slots_is_each_sample_by_itself(x):
    strategy = filled(made()).eval()
    whole = strategy.model(x)
    assert len(set(chosen(strategy, x).tolist())) > 1
    assert torch.allclose(whole, torch.cat([strategy.model(x[b : b + 1]) for b in range(B)]), rtol=0, atol=1e-12)
    with strategy.pool.resting():
        assert not torch.allclose(whole, strategy.model(x), rtol=0, atol=1e-3)


@pytest.mark.parametrize("behind", [False, True])
def test_a_layer_by_hand(behind):
    torch.manual_seed(0)
    base = torch.nn.Linear(4, 6).double()
    layer = PooledLinear(base, 3, 2, 1.5, behind)
    torch.nn.init.normal_(layer.b)
    x, layer.slots = torch.randn(4, 5, 4).double(), torch.tensor([2, 0, 2, 1])
    found = layer(x)
    for b, slot in enumerate(layer.slots):
        u = base(x[b])
        seen = u if behind else x[b]
        expected = u + 1.5 * seen @ layer.a[slot].T @ layer.b[slot].T
        assert torch.allclose(found[b], expected, rtol=0, atol=1e-12)
    assert torch.linalg.matrix_rank(layer.b[0] @ layer.a[0]) == 2
    layer.slots = torch.tensor([0, 1])
    with pytest.raises(UserError, match="sees 4 rows for 2 samples"):
        layer(x)


def test_what_changes_are_queries_values_and_the_layer_that_widens():
    layers = made().pool.layers
    found = [(layer.behind, layer.in_features, layer.out_features) for layer in layers]
    assert found == [(False, D, 3 * D)] * 2 + [(True, D, 4 * D)] * 2  # the fused projections, fc1 of the two blocks


def test_slots_that_no_sample_chose_get_no_gradient(x):
    strategy = filled(made())
    strategy.training_step((x, torch.arange(B) % 2), 0).backward()
    chosen = (strategy.chosen.counts > 0).tolist()
    assert 0 < sum(chosen) < P
    for parameter in (strategy.keys, *(p for layer in strategy.pool.layers for p in (layer.a, layer.b))):
        assert [bool(g.any()) for g in parameter.grad] == chosen


def test_the_loss_by_hand_draws_keys_to_their_queries(x):
    strategy, y = filled(made(pull=0.3)), torch.arange(B) % 2
    q = queries(strategy, x)
    loss = strategy.train().training_step((x, y), 0)
    slots = chosen(strategy.eval(), x)  # c is the same for all in the first experience
    logits = strategy.model(x)[:, :2]
    cosines = F.cosine_similarity(q, strategy.keys[slots])
    assert torch.allclose(loss, F.cross_entropy(logits, y) - 0.3 * cosines.mean(), rtol=0, atol=1e-12)
    (slope,) = torch.autograd.grad(loss, strategy.keys)
    assert torch.allclose((slope * strategy.keys).sum(1), torch.zeros(P).double(), rtol=0, atol=1e-12)
    moved = F.cosine_similarity(q, (strategy.keys - 1e-3 * slope)[slots])
    assert (moved.mean() > cosines.mean()).item()


def test_later_tasks_avoid_slots_that_were_chosen_and_evaluation_does_not(x):
    strategy = filled(made())
    before = chosen(strategy.eval(), x)
    strategy.train().training_step((x, torch.arange(B) % 2), 0)
    counts = torch.bincount(before, minlength=P)
    assert strategy.chosen.counts.tolist() == counts.tolist()
    assert torch.allclose(strategy.favour, torch.full((P,), 1 / P).double(), rtol=1e-6)
    strategy.end(None)
    learning(strategy, 1)
    inverse = 1 / (counts.double() / B + 1e-6)
    assert torch.allclose(strategy.favour, inverse / inverse.sum(), rtol=1e-6)
    now = chosen(strategy, x)
    assert not set(now.tolist()) & set(before.tolist())
    likeness = F.cosine_similarity(queries(strategy, x)[:, None], strategy.keys[None], dim=2)
    assert now.tolist() == ((likeness + 1) * inverse).argmax(1).tolist()
    assert chosen(strategy.eval(), x).tolist() == before.tolist()


def test_the_query_does_not_depend_on_what_is_trained(x):
    strategy = filled(made())
    seen = []
    asked = strategy.model.backbone.features
    strategy.model.backbone.features = lambda inputs: seen.append(asked(inputs)) or seen[-1]
    for _ in range(2):
        strategy.training_step((x, torch.arange(B) % 2), 0)
        with torch.no_grad():
            strategy.keys.mul_(-1)
            for layer in strategy.pool.layers:
                layer.a.mul_(2)
    assert torch.equal(seen[0], seen[2])
    assert not seen[0].requires_grad
    assert not torch.equal(seen[1], seen[3])


def test_one_slot_is_one_lora(x):
    strategy = filled(made(pool=1)).eval()
    found = strategy.model(x)
    layers = strategy.pool.layers
    with strategy.pool.resting(), torch.no_grad():
        for layer in layers:
            change = layer.scale * layer.b[0] @ layer.a[0]
            extra = torch.eye(len(change)).double() + change if layer.behind else None
            if layer.behind:
                layer.weight.copy_(extra @ layer.weight)
                layer.bias.copy_(extra @ layer.bias)
            else:
                layer.weight += change
        assert torch.allclose(strategy.model(x), found, rtol=0, atol=1e-12)


def test_refusals():
    with pytest.raises(
        UserError, match=r"backbone: has no projections to queries and values to change \(its layers are"
    ):
        L2M(model=Classifier(slim_resnet18((3, 8, 8), width=2), Growing(16, 2)))
    for option in ("pool", "rank", "alpha", "pull"):
        with pytest.raises(UserError, match=rf"strategy\.{option}: 0"):
            made(**{option: 0})
