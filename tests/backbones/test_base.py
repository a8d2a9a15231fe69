import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clplat.backbones.base import Classifier
from clplat.backbones.mlp import mlp
from clplat.errors import UserError
from clplat.heads import Growing, Linear
from clplat.stream import Experience, Kind


def test_classifier_equals_a_hand_written_network_bit_for_bit():
    torch.manual_seed(0)
    ours = Classifier(mlp((1, 8, 8)), Linear(400, 10))
    torch.manual_seed(0)
    hand = nn.Sequential(
        nn.Flatten(), nn.Linear(64, 400), nn.ReLU(), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 10)
    )
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, hand)]
    for _ in range(3):
        x, y = torch.randn(32, 1, 8, 8), torch.randint(10, (32,))
        losses = []
        for model, optimizer in zip((ours, hand), optimizers, strict=True):
            optimizer.zero_grad()
            losses.append(F.cross_entropy(model(x), y))
            losses[-1].backward()
            optimizer.step()
        assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), hand.parameters(), strict=True))


def test_classifier_grows_its_head_and_gives_features():
    model = Classifier(mlp((5,), [7]), Growing(7, 3))
    model.grow(Experience(index=0, name="e", kind=Kind.LEARN, train=None, classes=(0, 1)))
    x = torch.randn(4, 5)
    assert model(x).shape == (4, 2)
    assert torch.equal(model.features(x), model.backbone(x))


def test_role_that_does_not_exist_is_refused():
    with pytest.raises(UserError, match="attention, ffn"):
        mlp((5,)).layers("convolution")  # type: ignore[arg-type]
