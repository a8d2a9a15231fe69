"""Activations that are computed again: the same gradients, dropout included, and a line where it is not known."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from sharded import IMAGES, config
from torch import nn

from clplat.backbones.vit import vit_micro
from clplat.config.resolve import resolve
from clplat.errors import UserError
from clplat.run.build import build
from clplat.run.recomputing import recompute


def passes(backbone: nn.Module) -> tuple[list[torch.Tensor | None], int]:
    """Gradients of one step, and how often the first block's attention was passed."""
    count = list[int]()
    handle = backbone.net.blocks[0].attn.register_forward_hook(lambda *_: count.append(1))
    torch.manual_seed(1)
    backbone(torch.randn(3, 1, 8, 8)).square().mean().backward()
    handle.remove()
    return [p.grad for p in backbone.parameters()], len(count)


def test_gradients_are_the_same_to_the_last_bit_with_dropout() -> None:
    torch.manual_seed(0)
    plain = vit_micro((1, 8, 8), dim=16, heads=2)
    for block in plain.net.blocks:
        block.mlp.drop1 = nn.Dropout(0.5)
    again, other = copy.deepcopy(plain), copy.deepcopy(plain)
    recompute(again)
    (expected, once), (found, twice) = passes(plain), passes(again)
    assert (once, twice) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    recompute(other)
    copied = copy.deepcopy(other)  # the passes of a copy are its own
    with torch.no_grad():
        other.net.blocks[0].attn.qkv.weight.zero_()
    assert all(torch.equal(a, b) for a, b in zip(expected, passes(copied)[0], strict=True))


def test_without_gradients_nothing_is_computed_again() -> None:
    backbone = vit_micro((1, 8, 8), dim=16, heads=2)
    recompute(backbone)
    with torch.no_grad():
        outputs = backbone(torch.randn(3, 1, 8, 8))
    assert not outputs.requires_grad


@pytest.mark.parametrize(("key", "value", "line"), [
    ("strategy", "l2p", "true, but L2P has not been seen to learn the same with it"),
    ("strategy", "ewc", "true, but EWC has not been seen to learn the same with it (valid: false)"),
    ("backbone", "cnn", "backbone cnn keeps its activations (valid: language_model, text_encoder, vit, clip)"),
])  # fmt: skip
def test_what_was_not_seen_is_refused(tmp_path: Path, key: str, value: str, line: str) -> None:
    given = {**IMAGES, "strategy": "naive", key: value}
    with pytest.raises(UserError, match=r"loop\.activation_checkpointing") as raised:
        build(resolve(config=config(tmp_path, given, loop={"activation_checkpointing": True})))
    assert line in str(raised.value)
