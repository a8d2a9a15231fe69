import pytest
import torch
from torch import nn

from clplat.backbones.mlp import mlp
from clplat.errors import UserError


@pytest.mark.parametrize(("hidden", "dim"), [([400, 400], 400), ([30, 20, 10], 10), ([], 64)])
def test_shapes_and_gradients(hidden, dim):
    net = mlp((1, 8, 8), hidden)
    features = net(torch.randn(3, 1, 8, 8))
    assert features.shape == (3, dim)
    assert net.embed_dim == dim
    assert len(net.blocks) == len(hidden)
    if hidden:
        features.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_layers_by_role():
    net = mlp((64,))
    layers = net.layers("ffn")
    assert [net.get_submodule(name) for name in layers] == list(layers.values())
    assert list(layers.values()) == [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert net.layers("attention") == {}


def test_blocks_give_activations_in_order():
    net = mlp((4,), [5, 6])
    hidden = x = torch.randn(2, 4)
    for block in net.blocks:
        hidden = block(hidden)
        assert (hidden >= 0).all()
    assert torch.equal(hidden, net(x))


def test_faults_name_the_option():
    with pytest.raises(UserError, match=r"backbone\.hidden: \[3, 0\]"):
        mlp((4,), [3, 0])
    with pytest.raises(UserError, match=r"backbone\.input_shape"):
        mlp((4, 0))
