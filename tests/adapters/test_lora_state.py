import copy

import pytest
import torch
from small_lora import X, make, stirred, tiny_vit
from torch import nn

from clplat.adapters import LoRA, plain_state
from clplat.errors import UserError


class Holder(nn.Module):
    """As a strategy holds them: the model first."""

    def __init__(self, **options):
        super().__init__()
        self.backbone, _ = tiny_vit(), None
        self.lora = LoRA(self.backbone, "ffn", **{"rank": 2, "alpha": 3.0, **options})

    def grow(self, *adapters):
        for adapter in adapters:
            self.lora.add(adapter)
        self.lora.use(*adapters, train=adapters[-1:])


def test_state_comes_back_into_a_learner_that_was_grown_alike():
    first, second = Holder(), Holder()
    first.grow("a", "b")
    stirred(first.lora, "a", "b")
    first.lora.use("b", train="b")
    torch.manual_seed(99)
    second.grow("a", "b")
    assert first.state_dict().keys() == second.state_dict().keys()
    keys = second.load_state_dict(first.state_dict(), strict=True)
    assert not keys.missing_keys
    assert torch.equal(second.backbone(X), first.backbone(X))  # "a" is out of use here too
    assert second.lora.active == second.lora.trained == ("b",)


def test_names_in_the_state_are_stable():
    holder = Holder()
    holder.grow("a")
    stem = "backbone.net.blocks.0.mlp.fc1"
    names = {
        f"{stem}.base_layer.weight",
        f"{stem}.base_layer.bias",
        f"{stem}.lora_A.a.weight",
        f"{stem}.lora_B.a.weight",
    }
    assert {n for n in holder.state_dict() if n.startswith(stem)} == names
    assert {n for n in holder.state_dict() if n.startswith("lora.")} == {"lora._extra_state"}  # no tensor twice


def test_a_state_of_another_structure_is_refused():
    first, second = Holder(), Holder()
    first.grow("a", "b")
    second.grow("a")
    with pytest.raises((UserError, RuntimeError)):
        second.load_state_dict(first.state_dict(), strict=True)
    with pytest.raises(UserError, match="grown to"):
        second.lora.set_extra_state(first.lora.get_extra_state())


def test_a_merged_state_with_factors_that_are_not_zero_is_refused():
    first, second = Holder(), Holder()
    first.grow("a")
    stirred(first.lora, "a")
    factors = {k: v.clone() for k, v in first.state_dict().items() if ".lora_" in k}
    first.lora.merge("a")
    good = first.state_dict()
    second.grow("a")
    second.load_state_dict(good)
    torch.testing.assert_close(second.backbone(X), first.backbone(X))
    with pytest.raises(UserError, match="count twice"):
        second.load_state_dict({**good, **factors})


def test_a_merge_of_pefts_own_can_not_be_saved():
    holder = Holder()
    holder.grow("a")
    stirred(holder.lora, "a")
    holder.backbone.net.blocks[0].mlp.fc1.merge()
    with pytest.raises(RuntimeError, match="merged past"):
        holder.state_dict()


def test_an_adapter_trained_again_after_a_merge_is_no_longer_empty():
    first, second = Holder(), Holder()
    for holder in (first, second):
        holder.grow("a")
    stirred(first.lora, "a")
    first.lora.merge("a")
    assert not any(p.requires_grad for p in first.lora.parameters_of("a"))
    first.lora.use("a", train="a")
    stirred(first.lora, "a")
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.backbone(X), first.backbone(X))


def test_a_copy_has_adapters_of_its_own():
    holder = Holder()
    holder.grow("a")
    other = copy.deepcopy(holder)
    stirred(other.lora, "a")
    assert torch.equal(holder.backbone(X), tiny_vit()(X))
    assert other.lora.backbone is other.backbone
    assert not torch.equal(other.backbone(X), holder.backbone(X))


def test_plain_state_is_that_of_a_backbone_without_adapters():
    backbone, lora = make("both")
    for adapter in ("a", "b"):
        lora.add(adapter)
    stirred(lora, "a", "b")
    lora.use("a")
    plain = tiny_vit()
    plain.load_state_dict(plain_state(backbone), strict=True)
    torch.testing.assert_close(plain(X), backbone(X), rtol=1e-5, atol=1e-5)
