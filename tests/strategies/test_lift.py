import numpy as np
import pytest
import torch

from clplat.backbones.base import Classifier
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.heads import Growing
from clplat.errors import UserError
from clplat.strategies.lift import LIFT, principal
from clplat.strategies.naive import Naive

ALL = 10**6  # rank with which every entry learns


def make(net, **options):
    return LIFT(model=net, **{"roles": ["ffn"], "rank": 1, "approximation": 2, "lr": 0.05, **options})


def layers(net):
    return [layer.weight for layer in net.backbone.layers("ffn").values()]


def some(*shape):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


# --- which entries ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rank", [1, 2, 4])
def test_entries_are_the_largest_of_the_approximation(rank):
    weight = some(4, 6)
    u, s, vt = np.linalg.svd(weight.numpy(), full_matrices=False)
    size = np.abs((u[:, :rank] * s[:rank]) @ vt[:rank])
    found = principal(weight, rank, 7).numpy()
    assert found.sum() == 7
    assert size[found].min() >= size[~found].max()
    if rank < 4:  # not those of the weight itself, nor of what the approximation leaves
        for other in (np.abs(weight.numpy()), np.abs(weight.numpy() - (u[:, :rank] * s[:rank]) @ vt[:rank])):
            assert other[found].min() < other[~found].max()


def test_of_rank_one_by_hand():
    left, right = torch.tensor([3.0, -1.0, 0.5]), torch.tensor([1.0, -2.0])
    expected = torch.tensor([[True, True], [False, True], [False, False]])  # |u_i v_j|: 3 6, 1 2, 0.5 1
    assert torch.equal(principal(left.outer(right), 1, 3), expected)


def test_the_approximation_of_full_rank_is_the_weight():
    weight = some(4, 6)
    least = weight.abs().flatten().sort(descending=True).values[6]
    assert torch.equal(principal(weight, 9, 7), weight.abs() >= least)


def test_as_many_as_an_adapter_has(experiences, model):
    strategy = make(model(hidden=(7, 6)))
    strategy.begin(experiences(1)[0])
    assert [int(m.sum()) for m in strategy.masks.values()] == [5 + 7, 7 + 6]
    for weight, mask in zip(layers(strategy.model), strategy.masks.values(), strict=True):
        assert torch.equal(mask, principal(weight.detach(), 2, sum(weight.shape)))


# --- what moves -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_nothing_but_the_chosen_entries_and_the_head_moves(optimizer, experiences, model, drive):
    net, (e,) = model(hidden=(7, 6)), experiences(1)
    before = {n: p.detach().clone() for n, p in net.backbone.named_parameters()}
    momentum = {"momentum": 0.9} if optimizer == "sgd" else {}
    strategy = drive(make(net, optimizer=optimizer, interval=None, **momentum), [e], epochs=4, clip=1.0)
    masks = {id(w): m for w, m in zip(layers(net), strategy.masks.values(), strict=True)}
    for name, parameter in net.backbone.named_parameters():
        moved = parameter != before[name]
        assert not (moved & ~masks.get(id(parameter), torch.zeros_like(moved))).any()
        assert moved.any() == (id(parameter) in masks)


def test_with_all_entries_it_is_fine_tuning_of_the_layers(experiences, model, drive):
    stream, nets = experiences(2), [model(hidden=(7, 6)), model(hidden=(7, 6))]
    drive(make(nets[0], rank=ALL, optimizer="adamw", interval=3), stream)
    for name, parameter in nets[1].backbone.named_parameters():
        parameter.requires_grad_(name.endswith("weight"))
    drive(Naive(model=nets[1], optimizer="adamw", lr=0.05, weight_decay=0.0), stream)
    for one, two in zip(nets[0].parameters(), nets[1].parameters(), strict=True):
        assert torch.equal(one, two)


def test_adam_on_the_chosen_entries_alone_takes_the_same_steps(experiences, model, drive):
    """Against Adam by hand whose moments are vectors of the chosen entries; masks anew every 4 steps."""
    (e,) = experiences(1)
    strategy, trail, seen = make(model(hidden=(7,)).double(), optimizer="adam", interval=4), [], []
    strategy._prepare = lambda raw, augmented: raw.double()
    (weight,) = layers(strategy.model)
    inner = strategy.on_before_optimizer_step
    (mask,) = strategy.masks.values()

    def watched(optimizer):
        inner(optimizer)
        seen.append((weight.detach().clone(), weight.grad.clone(), mask.detach().clone()))

    strategy.on_before_optimizer_step = watched
    drive(strategy, [e], epochs=3, each_step=lambda s: trail.append(weight.detach().clone()))
    first, second = torch.zeros_like(weight), torch.zeros_like(weight)
    for k, ((before, gradient, chosen), after) in enumerate(zip(seen, trail, strict=True), 1):
        assert not gradient[~chosen].any()
        first, second = (torch.where(chosen, m, 0.0) for m in (first, second))
        first = torch.where(chosen, 0.9 * first + 0.1 * gradient, 0.0)
        second = torch.where(chosen, 0.999 * second + 0.001 * gradient**2, 0.0)
        step = 0.05 * first / (1 - 0.9**k) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)
        torch.testing.assert_close(after, before - torch.where(chosen, step, 0.0), atol=1e-12, rtol=0)
        assert torch.equal(after[~chosen], before[~chosen])
    masks = [m for _, _, m in seen]
    assert [k for k in range(1, len(masks)) if not torch.equal(masks[k - 1], masks[k])] == [4, 8]


def test_entries_are_chosen_anew_for_each_experience(experiences, model, drive):
    stream = experiences(2)
    strategy = make(model(hidden=(7, 6)), interval=None)
    strategy.grow(stream[0])
    strategy.begin(stream[0])
    assert strategy.measurements() == {"overlap": 0.0}
    old = [m.clone() for m in strategy.masks.values()]
    drive(strategy, stream[:1])
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    same = sum(int((a & b).sum()) for a, b in zip(old, strategy.masks.values(), strict=True))
    assert strategy.measurements()["overlap"] == pytest.approx(same / (5 + 7 + 7 + 6))
    assert 0 < strategy.measurements()["overlap"] < 1


def test_what_the_user_froze_has_no_mask_and_stays(experiences, model, drive):
    net = model(hidden=(7, 6))
    frozen = layers(net)[0].requires_grad_(False)
    before = frozen.detach().clone()
    strategy = drive(make(net), experiences(1))
    assert torch.equal(frozen, before)
    assert len(strategy.masks) == 1


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: make(model(), interval=2), experiences(2))


def test_refuses_what_it_cannot_do(model):
    with pytest.raises(UserError, match="backbone: has no linear layers of role attention"):
        make(model(), roles=["attention"])
    with pytest.raises(UserError, match="its layers are convolutions"):
        LIFT(model=Classifier(slim_resnet18((3, 8, 8), width=2), Growing(16, 2)))
    for option, value in {"rank": 0, "approximation": 0, "interval": 0, "weight_decay": 0.1}.items():
        with pytest.raises(UserError, match=rf"strategy.{option}: {value} is out of range"):
            make(model(), **{option: value})
