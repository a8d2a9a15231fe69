"""Adapters that train, rest, are merged, reset and copied."""

import math

import pytest
import torch
from small_lora import X, changed_by_hand, make, stirred, tiny_vit

# --- what is trained --------------------------------------------------------------------------------------------------


def test_only_what_is_named_is_trained_and_the_rest_of_the_backbone_is_left_as_it_was():
    backbone, lora = make("ffn")
    frozen = backbone.net.pos_embed.requires_grad_(False)
    for adapter in ("old", "new"):
        lora.add(adapter)
    factors = {id(p) for a in ("old", "new") for p in lora.parameters_of(a)}
    assert all(p.requires_grad == (p is not frozen) for p in backbone.parameters() if id(p) not in factors)
    lora.use("old", "new", train="new")
    assert all(p.requires_grad for p in lora.parameters_of("new"))
    assert not any(p.requires_grad for p in lora.parameters_of("old"))  # in use, and frozen
    lora.add("third")
    assert lora.active == ("old", "new")
    assert all(p.requires_grad for p in lora.parameters_of("new"))
    assert not any(p.requires_grad for a in ("old", "third") for p in lora.parameters_of(a))


def test_an_adapter_that_gets_no_gradient_can_not_be_trained():
    _, lora = make()
    lora.add("a")
    lora.add("b")
    with pytest.raises(ValueError, match="'b' can't be trained"):
        lora.use("a", train="b")
    with pytest.raises(ValueError, match="no adapter 'c'"):
        lora.use("c")


def test_training_moves_the_trained_factors_and_nothing_else():
    backbone, lora = make("both")
    lora.add("old")
    lora.add("new")
    stirred(lora, "old")
    lora.use("old", "new", train="new")
    lora.rest(backbone)
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    optimizer = torch.optim.AdamW([p for p in backbone.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backbone(X).square().sum().backward()
        optimizer.step()
    moved = {k for k, v in backbone.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {k for k in before if ".new." in k}


def test_rest_and_wake_leave_what_the_user_froze():
    backbone, lora = make("ffn")
    frozen = backbone.net.pos_embed.requires_grad_(False)
    lora.add("a")
    lora.use("a", train="a")
    lora.rest(backbone)
    lora.rest(backbone)
    assert {id(p) for p in backbone.parameters() if p.requires_grad} == {id(p) for p in lora.parameters_of("a")}
    lora.wake()
    assert all(p.requires_grad == (p is not frozen) for p in backbone.parameters())


def test_using_is_undone():
    backbone, lora = make("ffn")
    lora.add("fast")
    lora.add("slow")
    stirred(lora, "fast", "slow")
    lora.use("fast", train="fast")
    fast = backbone(X)
    with lora.using("slow"), torch.no_grad():
        slow = backbone(X)
    torch.testing.assert_close(slow.double(), changed_by_hand(lora, ("slow",), 1.5)(X.double()), rtol=1e-5, atol=1e-5)
    assert torch.equal(backbone(X), fast)
    assert lora.trained == ("fast",)
    assert all(p.requires_grad for p in lora.parameters_of("fast"))
    assert not any(p.requires_grad for p in lora.parameters_of("slow"))


# --- merging ----------------------------------------------------------------------------------------------------------


def test_merging_keeps_the_outputs_and_the_scale_and_empties_the_adapter():
    backbone, lora = make("ffn", alpha=3.0)
    lora.add("a")
    stirred(lora, "a")
    lora.use("a", train="a")
    expected, by_hand = backbone(X), changed_by_hand(lora, ("a",), 1.5)
    lora.merge("a")
    torch.testing.assert_close(backbone(X), expected, rtol=1e-5, atol=1e-5)
    for name, layer in backbone.layers("ffn").items():
        torch.testing.assert_close(layer.weight.double(), by_hand.get_submodule(name).weight, rtol=1e-5, atol=1e-5)
    assert not any(b.any() for _, b in lora.factors("a").values())
    lora.use()  # the change is in the base now: taking the adapter out loses nothing
    torch.testing.assert_close(backbone(X), expected, rtol=1e-5, atol=1e-5)
    lora.merge("a")  # once more adds nothing
    torch.testing.assert_close(backbone(X), expected, rtol=1e-5, atol=1e-5)


def test_merging_and_removing_one_of_several_keeps_the_sum():
    backbone, lora = make("ffn")
    lora.add("a")
    lora.add("b")
    stirred(lora, "a", "b")
    lora.use("a", "b")
    expected = backbone(X)
    lora.merge("a")
    lora.remove("a")
    assert list(lora.adapters) == ["b"]
    assert not any(".a." in name for name in backbone.state_dict())
    torch.testing.assert_close(backbone(X), expected, rtol=1e-5, atol=1e-5)


def test_a_change_is_not_merged_into_what_the_user_froze():
    backbone = tiny_vit()
    backbone.requires_grad_(False)
    _, lora = make("ffn", backbone)
    lora.add("a")
    assert not lora.mergeable
    with pytest.raises(ValueError, match="frozen by the user"):
        lora.merge("a")


def test_reset_draws_in_the_bounds_and_drops_the_change():
    backbone, lora = make("ffn", rank=8)
    lora.add("a")
    for slope, bound in ((math.sqrt(5), 1.0), (math.sqrt(50), math.sqrt(6 / 51))):
        stirred(lora, "a")
        lora.reset("a", slope)
        for a, b in lora.factors("a").values():
            limit = bound / math.sqrt(a.shape[1])
            assert 0.8 * limit < a.abs().max() <= limit
            assert not b.any()
    lora.use("a")
    assert torch.equal(backbone(X), tiny_vit()(X))


def test_copy_gives_the_same_change():
    _, lora = make("ffn")
    lora.add("a")
    lora.add("b")
    stirred(lora, "a")
    lora.copy("a", "b")
    assert all(torch.equal(p, q) for p, q in zip(lora.parameters_of("a"), lora.parameters_of("b"), strict=True))
