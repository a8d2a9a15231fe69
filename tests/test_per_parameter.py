"""A tensor for each parameter that is trained: what freezing and thawing do to it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from clplat import PerParameter, trainable


def test_a_frozen_parameter_has_none_keeps_its_own_and_gets_zeros_when_thawed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    held = PerParameter(model)
    assert list(trainable(model)) == ["1.weight", "1.bias"]
    with pytest.raises(KeyError):
        held.of(["0.weight"])
    held.of(["1.weight"])[0].fill_(3.0)
    model[1].requires_grad_(False)
    model[0].requires_grad_(True)
    held.grow(model)
    assert torch.equal(held.of(["1.weight"])[0], torch.full((2, 2), 3.0))
    assert torch.equal(held.of(["0.weight"])[0], torch.zeros(2, 2))
    assert not list(trainable(held))  # no optimizer steps on them
