"""Prefixes: what attention computes with them, on every kind of mask; what can't take them; the backbone at rest."""

import math

import pytest
import torch
import torch.nn.functional as F

from clplat.adapters.prefixes import Prefixes, _Prepending
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.timm import timm
from clplat.backbones.vit import vit_micro
from clplat.errors import UserError

B, H, P, N, D = 3, 2, 5, 4, 6  # d = 3


def by_hand(query, key, value, keys, values, mask):
    """Softmax attention as it is written, sample by sample and head by head, in float64."""
    out = torch.empty(B, H, P, 3, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            own = slice(3 * h, 3 * h + 3)
            k = torch.cat([keys[b, :, own], key[b, h]])
            v = torch.cat([values[b, :, own], value[b, h]])
            scores = query[b, h] @ k.T / math.sqrt(3) + F.pad(mask[b], (N, 0))
            out[b, h] = torch.softmax(scores, dim=1) @ v
    return out


MASKS = {
    "none": ({}, torch.zeros(B, P, P)),
    "causal": ({"is_causal": True}, torch.full((P, P), -torch.inf).triu(1).expand(B, P, P)),
    "padded": (
        {"attn_mask": (torch.arange(P) < torch.tensor([[2], [5], [3]]))[:, None, None]},
        torch.where(torch.arange(P) < torch.tensor([[2], [5], [3]]), 0, -torch.inf)[:, None].expand(B, P, P),
    ),
    "added": ({"attn_mask": torch.arange(P) / torch.ones(P, 1)}, (torch.arange(P) / torch.ones(B, P, 1))),
}


@pytest.mark.parametrize("kind", MASKS)
def test_attention_is_that_over_prefix_and_tokens(kind):
    how, mask = MASKS[kind]
    query, key, value = torch.randn(3, B, H, P, 3, dtype=torch.float64)
    keys, values = torch.randn(2, B, N, D, dtype=torch.float64)
    how = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in how.items()}
    with _Prepending(keys, values):
        found = F.scaled_dot_product_attention(query, key, value, **how)
    torch.testing.assert_close(found, by_hand(query, key, value, keys, values, mask.double()), rtol=0, atol=1e-12)


@pytest.fixture
def backbone():
    return vit_micro((1, 8, 8), patch_size=4, dim=D, depth=3, heads=H)


def test_only_the_blocks_that_were_asked_for_and_only_while_it_does_not_rest(backbone):
    x = torch.randn(B, 1, 8, 8)
    before = backbone(x)
    given = [torch.randn(B, N, D), torch.randn(B, N, D)]
    prefixes = Prefixes(backbone, 2, lambda _: [tuple(given)] * 2)
    second = backbone(x)
    assert not torch.allclose(second, before)
    with prefixes.resting():
        assert torch.equal(backbone(x), before)
    assert torch.equal(backbone(x), second)
    with backbone.recorded() as states:
        backbone(x)
    tokens = states.outputs[1].detach()
    assert torch.equal(states.outputs[2], backbone.blocks[2](tokens))  # without any, by itself


def test_the_maker_sees_the_backbone_without_prefixes(backbone):
    x = torch.randn(B, 1, 8, 8)
    plain, seen = backbone(x), []

    def make(inputs):
        seen.append(backbone(inputs))
        return [(torch.ones(B, N, D), torch.ones(B, N, D))]

    Prefixes(backbone, 1, make)
    assert not torch.equal(backbone(x), plain)
    assert torch.equal(seen[0], plain)


def test_gradients_reach_a_prefix_and_a_failed_pass_leaves_nothing_behind(backbone):
    given = torch.randn(2, B, N, D, requires_grad=True)
    prefixes = Prefixes(backbone, 1, lambda _: [(given[0], given[1])])
    backbone(torch.randn(B, 1, 8, 8)).sum().backward()
    assert bool(given.grad.flatten(1).any(1).all())
    with pytest.raises(RuntimeError):
        backbone(torch.randn(B, 7, 8, 8))
    assert prefixes._now == []


def test_what_can_not_take_them_says_so():
    with pytest.raises(UserError, match=r"has no attention that prefixes could go before .its layers are convolutions"):
        Prefixes(slim_resnet18((3, 8, 8), width=2), 1, lambda _: [])
    small = vit_micro((1, 8, 8), patch_size=4, dim=D, depth=3, heads=H)
    for count in (0, 4):
        with pytest.raises(UserError, match=rf"prefixes for {count} blocks, but the backbone has 3 \(valid: 1 to 3\)"):
            Prefixes(small, count, lambda _: [])
    windows = timm((3, 32, 32), "test_vit", image_size=32)
    Prefixes(windows, 1, lambda x: [(torch.zeros(len(x), 2, 5),) * 2])
    with pytest.raises(
        UserError, match=r"an attention has \d+ heads of \d+ keys or values for 2 sequences, not 5 for 2"
    ):
        windows(torch.zeros(2, 3, 32, 32))
    other = vit_micro((1, 8, 8), patch_size=4, dim=D, depth=3, heads=H)
    other.blocks[0].attn.forward = lambda x, *args, **kwargs: x
    Prefixes(other, 1, lambda x: [(torch.zeros(len(x), 2, D),) * 2])
    with pytest.raises(UserError, match=r"block 0 calls torch's scaled_dot_product_attention 0 times, not once"):
        other(torch.zeros(2, 1, 8, 8))
