import families
import pytest
import torch

from clplat.backbones.base import Classifier
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.heads import Growing
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError
from clplat.strategies.hft import HFT, drawn
from clplat.strategies.naive import Naive

DEPTH = 4


def llama(depth=DEPTH):
    stream = families.texts()
    return families.model("llama", stream, depth=depth), stream


def begun(net, experience, seed=0, **options):
    torch.manual_seed(seed)
    strategy = HFT(model=net, **options)
    strategy.grow(experience)
    strategy.begin(experience)
    return strategy


def learning(net):
    return {n for n, p in net.named_parameters() if p.requires_grad}


def counts(net, *leaves):
    """Of each block how many weights of these layers learn."""
    names = [n.split(".") for n in learning(net)]
    return [sum(str(k) in n and n[-2] in leaves for n in names) for k in range(DEPTH)]


# --- what is drawn ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_of_a_llama_it_is_half_of_each_category(seed):
    net, stream = llama()
    begun(net, stream[0], seed)
    assert counts(net, "q_proj", "k_proj", "v_proj", "o_proj") == [2] * DEPTH
    assert sorted(counts(net, "up_proj", "down_proj", "gate_proj")) == [1, 1, 2, 2]  # 1.5 L in all
    assert counts(net, "input_layernorm", "post_attention_layernorm") == [1] * DEPTH
    outside = {n for n, _ in net.named_parameters() if ".layers." not in n}
    assert len(outside) == 2  # the embedding, which is the last layer's weight, too, and the last norm
    assert outside <= learning(net)


@pytest.mark.parametrize(("granularity", "group"), [("layer", True), ("model", False)])
def test_at_other_granularities(granularity, group):
    leaves = ("q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "gate_proj", "input_layernorm")
    found = set()
    for seed in range(4):
        net, stream = llama()
        begun(net, stream[0], seed, granularity=granularity)
        each = counts(net, *leaves, "post_attention_layernorm")  # 9 of a block
        assert sum(each) == 18
        found.add(tuple(counts(net, *leaves[:4])))
        if group:
            assert sorted(each) == [4, 4, 5, 5]
        else:
            assert set(each) - {4, 5}
    assert len(found) > 1  # categories do not count


def test_shares_that_are_not_whole():
    for seed in range(40):
        found = [len(p) for p in drawn([100, 50, 30], 0.07, torch.Generator().manual_seed(seed))]  # 7, 3.5, 2.1
        assert found[0] == 7
        assert sum(found) in (12, 13)
    sums = [sum(map(len, drawn([1, 1, 1], 0.5, torch.Generator().manual_seed(s)))) for s in range(400)]
    assert set(sums) == {1, 2}
    lucky = {tuple(map(bool, drawn([1, 1], 0.5, torch.Generator().manual_seed(s)))) for s in range(20)}
    assert lucky == {(True, False), (False, True)}
    assert abs(sum(sums) / 400 - 1.5) < 0.125  # five standard deviations
    places = [tuple(p for group in drawn([4], 0.5, torch.Generator().manual_seed(s)) for p in group) for s in range(99)]
    assert {p for found in places for p in found} == {0, 1, 2, 3}
    assert all(len(set(found)) == 2 for found in places)


def test_the_draw_is_of_seed_and_experience_alone():
    net, stream = llama()
    strategy = begun(net, stream[0])
    first = learning(net)
    torch.rand(7)
    strategy.begin(stream[1])
    second = learning(net)
    strategy.begin(stream[0])
    assert learning(net) == first
    assert second != first
    other, _ = llama()
    begun(other, stream[0], seed=1)
    assert learning(other) != first


def test_a_layer_learns_with_its_bias_and_convolutions_count_by_themselves(experiences):
    (e,) = experiences(1)
    net = Classifier(vit_micro((3, 8, 8), patch_size=4, dim=8, depth=DEPTH, heads=2), Growing(8, 6))
    begun(net, e)
    assert counts(net, "qkv", "proj") == [2] * DEPTH  # one of two, its weight and its bias
    assert counts(net, "fc1", "fc2") == [2] * DEPTH
    net = Classifier(slim_resnet18((3, 8, 8), width=2), Growing(16, 6))
    begun(net, e)
    blocks = net.backbone.blocks
    assert blocks
    for block in blocks:
        matrices = [p.requires_grad for p in block.parameters() if p.ndim == 4]
        assert abs(sum(matrices) - len(matrices) / 2) <= 0.5


# --- what it does -----------------------------------------------------------------------------------------------------


def test_what_is_not_drawn_stays_and_what_is_moves(drive):
    net, stream = llama()
    strategy = HFT(model=net, lr=0.05, momentum=0.9, weight_decay=0.1)
    for e in stream:
        before = {n: p.detach().clone() for n, p in net.named_parameters()}
        drive(strategy, [e])
        moved = {n for n, p in net.named_parameters() if not torch.equal(p, before[n])}
        assert moved == learning(net)
        assert 0 < len(moved) < len(before)


def test_the_optimizer_has_what_learns_alone():
    net, stream = llama()
    held = {id(p) for g in begun(net, stream[0]).configure_optimizers().param_groups for p in g["params"]}
    assert held == {id(p) for p in net.parameters() if p.requires_grad}


def test_with_all_it_is_fine_tuning_and_with_nothing_nothing_learns(experiences, model, drive, equal):
    nets = [model(hidden=(7, 6)), model(hidden=(7, 6))]
    drive(HFT(model=nets[0], share=1.0), experiences())
    drive(Naive(model=nets[1]), experiences())
    assert equal(*nets)
    net, stream = llama()
    assert begun(net, stream[0], share=0.0, outside=False).measurements() == {"trained_share": 0.0}
    assert learning(net) == set()


def test_what_the_user_froze_is_not_drawn():
    net, stream = llama()
    frozen = [p for n, p in net.named_parameters() if "q_proj" in n or "embed" in n]
    for p in frozen:
        p.requires_grad_(False)
    begun(net, stream[0], share=1.0)
    assert frozen
    assert not any(p.requires_grad for p in frozen)
    assert len(learning(net)) == len(list(net.parameters())) - len(frozen)


def test_measures_the_share_that_learned(experiences, model):
    strategy = begun(model(hidden=(5, 5)), experiences(1)[0])
    assert strategy.measurements() == {"trained_share": 0.5}  # one of two layers of 30 numbers


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: HFT(model=model(hidden=(7, 6, 5))), experiences())


def test_refuses_what_it_cannot_do(model):
    with pytest.raises(UserError, match="backbone: has no blocks of which a part could learn"):
        HFT(model=model(hidden=()))
    with pytest.raises(UserError, match=r"strategy.share: 1.5 is out of range \(valid: in \[0, 1\]\)"):
        HFT(model=model(), share=1.5)
    with pytest.raises(UserError, match=r"strategy.granularity: 'head' is out of range \(valid: category, layer"):
        HFT(model=model(), granularity="head")
