import numpy as np
import pytest
import torch

from clplat import Data, Experience, Kind
from clplat.backbones.heads import Linear
from clplat.components.per_parameter import trainable
from clplat.strategies.mas import MAS, sensitivity
from clplat.strategies.naive import Naive


def test_sensitivity_by_an_independent_reference(model):
    """Of a linear model: |2 z_c x_d| for the weights and |2 z_c| for the offsets, mean over samples."""
    net, x = model(Linear, hidden=()).double(), torch.randn(7, 5, dtype=torch.float64)
    found = sensitivity(net, x)
    z = x.numpy() @ net.head.weight.detach().numpy().T + net.head.bias.detach().numpy()
    weight = np.abs(2 * z[:, :, None] * x.numpy()[:, None, :]).mean(0)
    np.testing.assert_allclose(found["head.weight"].numpy(), weight, rtol=0, atol=1e-10)
    np.testing.assert_allclose(found["head.bias"].numpy(), np.abs(2 * z).mean(0), rtol=0, atol=1e-10)


def test_sensitivity_of_a_deep_network_equals_a_loop(model):
    net, x = model(Linear).double(), torch.randn(7, 5, dtype=torch.float64)
    expected = {name: torch.zeros_like(p) for name, p in net.named_parameters()}
    for one in x:
        gradients = torch.autograd.grad(net(one[None]).square().sum(), list(net.parameters()))
        for name, g in zip(expected, gradients, strict=True):
            expected[name] += g.abs() / len(x)
    for name, value in sensitivity(net, x).items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-10)


def test_loss_by_hand(linear):
    strategy = MAS(model=linear(), penalty=10.0)
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    first = Experience(0, "a", Kind.LEARN, Data(x, y), classes=(0, 1))
    strategy.grow(first)
    plain = strategy.training_step((x, y), 0).item()
    strategy.end(first)
    strategy.grow(Experience(1, "b", Kind.LEARN, None, classes=(0, 1)))
    with torch.no_grad():
        strategy.model.head.bias += torch.tensor([1.0, 1.0])  # moves the penalty, not the cross-entropy
    # logits (1, 0.5): Ω of the offsets is (2, 1)
    assert abs(strategy.training_step((x, y), 0).item() - (plain + 10 * 3)) < 1e-4


def test_importance_adds_up_and_the_centre_moves_on(experiences, model, drive):
    stream = experiences(2)
    strategy = drive(MAS(model=model(), penalty=0.01), stream[:1])
    first = {name: strategy.importance.of([name])[0].clone() for name in trainable(strategy.model)}
    drive(strategy, stream[1:])
    strategy.eval()
    new = sensitivity(strategy.model, stream[1].train.all()[0])
    for name, p in trainable(strategy.model).items():
        new[name][tuple(slice(n) for n in first[name].shape)] += first[name]
        torch.testing.assert_close(strategy.importance.of([name])[0], new[name])
        assert torch.equal(strategy.centre.of([name])[0], p)


def test_zero_penalty_is_naive(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(MAS(model=model(), penalty=0), stream).model, drive(Naive(model=model()), stream).model)


@pytest.mark.parametrize("head", ["growing", "linear"])
def test_resumes(experiences, model, resumes, head):
    make = (lambda: model()) if head == "growing" else (lambda: model(Linear))
    assert resumes(lambda: MAS(model=make(), penalty=0.01), experiences())
