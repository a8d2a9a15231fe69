import pytest
import torch
from safetensors.torch import save_file

from clplat.backbones.resnets import resnet50, resnext29, wide_resnet28_10
from clplat.errors import UserError

MAKE = {"wide_resnet28_10": wide_resnet28_10, "resnext29": resnext29, "resnet50": resnet50}


@pytest.mark.parametrize(
    ("name", "dim", "blocks", "classes", "parameters"),
    [
        ("wide_resnet28_10", 640, 12, 10, 36_479_194),
        ("resnext29", 1024, 9, 100, 6_900_132),
        ("resnet50", 2048, 16, 1000, 25_557_032),
    ],
)
def test_shapes_and_published_parameter_counts(name, dim, blocks, classes, parameters):
    net = MAKE[name]((3, 32, 32)).eval()
    assert net(torch.rand(1, 3, 32, 32)).shape == (1, dim)
    assert (net.embed_dim, len(net.blocks)) == (dim, blocks)
    count = sum(p.numel() for p in net.parameters()) + (dim + 1) * classes
    assert count == parameters


@pytest.mark.parametrize(("name", "head"), [("resnext29", "classifier"), ("resnet50", "fc")])
def test_weights_round_trip(name, head, tmp_path):
    path, net = tmp_path / "w.safetensors", MAKE[name]((3, 32, 32))
    inner = getattr(net, "net", net)
    state = {k: v for k, v in inner.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file({**state, f"{head}.weight": torch.zeros(3, net.embed_dim), f"{head}.bias": torch.zeros(3)}, path)
    again = MAKE[name]((3, 32, 32), weights=str(path), normalize="half")
    other = getattr(again, "net", again)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in state.items())
    save_file({"odd": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=r"backbone\.weights: .* does not fit"):
        MAKE[name]((3, 32, 32), weights=str(path))
