import families
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing, Linear
from clplat.backbones.mlp import mlp
from clplat.backbones.vit import vit_micro
from clplat.components.losses import Losses
from clplat.errors import UserError
from clplat.strategy import losses
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


def test_blocks_outputs_are_recorded():
    net = vit_micro((1, 8, 8), dim=8, depth=3, heads=2)
    first, last = torch.randn(2, 1, 8, 8), torch.randn(5, 1, 8, 8)
    expected = []
    handles = [b.register_forward_hook(lambda m, i, o: expected.append(o)) for b in net.blocks]
    with net.recorded() as states:
        net(first)
        expected.clear()
        net(last)
    assert states.valid is None
    assert len(states.outputs) == 3
    assert all(torch.equal(a, b) for a, b in zip(states.outputs, expected, strict=True))
    for handle in handles:
        handle.remove()
    net(first)
    assert [len(o) for o in states.outputs] == [5, 5, 5]  # nothing is noted any more
    values = {name: p.detach() for name, p in net.named_parameters()}
    with net.recorded() as states:
        torch.func.functional_call(net, values, (first,))
    assert [len(o) for o in states.outputs] == [2, 2, 2]


def test_projections_of_an_attention():
    net = vit_micro((1, 8, 8), dim=8, depth=1, heads=2)
    assert [net.projection(n) for n in net.layers("attention")] == ["qkv", "output"]
    assert [net.projection(n) for n in net.layers("ffn")] == [None, None]


def test_the_loss_of_a_task_is_the_models_own_or_cross_entropy():
    class Own(nn.Linear):
        def losses(self, inputs, labels):
            return self(inputs).sum(1) * labels

    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    plain, own = nn.Linear(3, 2), Own(3, 2)
    assert torch.equal(losses(plain, x, y), F.cross_entropy(plain(x), y, reduction="none"))
    assert torch.equal(losses(own, x, y), own(x).sum(1) * y)
    assert torch.equal(Losses(own)(x, y), losses(own, x, y))
    assert [n for n, _ in Losses(own).named_parameters()] == ["model.weight", "model.bias"]


@pytest.mark.parametrize("family", families.ALL)
def test_a_batch_without_a_sample_has_no_losses_and_zero_gradients(family):
    """A process has one where an epoch's last batch has fewer samples than there are processes."""
    stream = families.ALL[family]()
    model = families.model(family, stream)
    experience = stream[0]
    model.grow(experience)
    inputs, labels = experience.train.batch(torch.arange(0))
    inputs = stream.prepare(inputs, True)
    assert len(model(inputs)) == 0
    found = losses(model, inputs, labels)
    assert found.shape == (0,)
    found.sum().backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())
    assert any(p.grad is not None for p in model.parameters())
