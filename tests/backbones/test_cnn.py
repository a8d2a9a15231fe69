import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clplat.backbones.cnn import Convolution, Pad, Project, cnn, resnet20, resnet32, slim_resnet18
from clplat.errors import MissingError, UserError


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize(("make", "dim", "blocks"), [(slim_resnet18, 160, 8), (resnet20, 64, 9), (resnet32, 64, 15)])
def test_shapes_gradients_and_blocks(make, dim, blocks, shape):
    net = make(shape)
    features = net(torch.randn(2, *shape))
    assert features.shape == (2, dim)
    assert net.embed_dim == dim
    assert len(net.blocks) == blocks
    (features * torch.randn(2, dim)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())
    assert net.layers("attention") == net.layers("ffn") == {}


def test_slim_resnet18_has_the_parameters_of_the_one_in_gem():
    # GEM's ResNet18(100, nf=20), its last layer (160 x 100 + 100) included.
    counted = sum(p.numel() for p in slim_resnet18((3, 32, 32)).parameters())
    assert counted + 160 * 100 + 100 == 1_109_240


def test_resnet20_has_the_published_parameters():
    assert sum(p.numel() for p in resnet20((3, 32, 32)).parameters()) + 64 * 10 + 10 == 269_722
    assert sum(p.numel() for p in resnet32((3, 32, 32)).parameters()) + 64 * 10 + 10 == 464_154


def test_cnn_is_slim_resnet18():
    torch.manual_seed(0)
    a = cnn((1, 8, 8), width=4)
    torch.manual_seed(0)
    b = slim_resnet18((1, 8, 8), width=4)
    assert all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_parameterless_shortcut():
    x = torch.randn(2, 2, 4, 4)
    y = Pad(2)(x)
    assert torch.equal(y[:, 1:3], x[:, :, [0, 2]][:, :, :, [0, 2]])
    assert (y[:, [0, 3]] == 0).all()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_the_strided_projection_is_a_strided_convolution(memory):
    project, conv = Project(4, 6, 1, 2, bias=False), nn.Conv2d(4, 6, 1, 2, bias=False).double()
    conv.weight.data.copy_(project.weight.data)
    inputs, ahead = torch.randn(6, 4, 7, 8).contiguous(memory_format=memory), torch.randn(6, 6, 4, 4)
    found, expected = project(inputs), conv(inputs.double())
    torch.testing.assert_close(found, expected.float(), atol=1e-4, rtol=1e-4)
    found.backward(ahead.contiguous(memory_format=memory))
    expected.backward(ahead.double())
    torch.testing.assert_close(project.weight.grad, conv.weight.grad.float(), atol=1e-3, rtol=1e-3)


def test_weights_round_trip(tmp_path):
    path = tmp_path / "w.safetensors"
    net = resnet20((3, 32, 32))
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file({**state, "linear.weight": torch.zeros(10, 64), "linear.bias": torch.zeros(10)}, path)
    again = resnet20((3, 32, 32), weights=str(path))
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in state.items())
    with pytest.raises(UserError, match=r"lacks layer1\.3"):
        resnet32((3, 32, 32), weights=str(path))
    with pytest.raises(UserError, match=r"conv1\.weight is \(16, 3, 3, 3\), the model's \(16, 1, 3, 3\)"):
        resnet20((1, 32, 32), weights=str(path))


def test_weights_that_are_not_there_damaged_or_unsafe(tmp_path):
    with pytest.raises(MissingError, match=r"put the weights there") as missing:
        resnet20((3, 32, 32), weights=str(tmp_path / "none.safetensors"))
    assert missing.value.exit_code == 3
    (tmp_path / "cut.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(UserError, match="damaged"):
        resnet20((3, 32, 32), weights=str(tmp_path / "cut.safetensors"))
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(UserError, match=r"no \.safetensors file"):
        resnet20((3, 32, 32), weights=str(tmp_path / "w.pth"))


def test_inputs_that_are_no_images_are_refused():
    with pytest.raises(UserError, match=r"\(64,\)"):
        cnn((64,))
    with pytest.raises(UserError, match=r"backbone\.width"):
        cnn((1, 8, 8), width=0)


def _cifar10(root):
    """Test images (N, 3, 32, 32) uint8 and labels of the CIFAR-10 subset, unpacked or as it is distributed."""
    if (root / "cifar10" / "test.npz").is_file():
        with np.load(root / "cifar10" / "test.npz") as data:
            return data["images"].transpose(0, 3, 1, 2), data["labels"]
    with np.load(root / "cifar10" / "subset_500_100.npz") as data:
        x = np.cumsum(np.cumsum(data["test_resid"], -1, dtype=np.uint8), -2, dtype=np.uint8)
        x[:, 1:] += x[:, :1]
        return x[:, [1, 0, 2]], data["test_label"]


# Published for the whole test set; 100 images a class are here, so two standard errors are 0.017.
@pytest.mark.parametrize(("make", "name", "published"), [(resnet20, "cifar10_resnet20", 0.9173),
                                                         pytest.param(resnet32, "cifar10_resnet32", 0.9263,
                                                                      marks=pytest.mark.slow)])  # fmt: skip
def test_pretrained_accuracy_is_the_published_one(make, name, published):
    root = Path(os.environ.get("CLPLAT_DATA", "/nonexistent"))
    weights = root / "weights" / name / "model.safetensors"
    if not weights.is_file():
        pytest.skip(f"CLPLAT_DATA has no weights/{name}/model.safetensors")
    from safetensors import safe_open

    net = make((3, 32, 32), weights=str(weights)).eval()
    with safe_open(weights, "pt") as file:
        classifier = nn.Linear(64, 10)
        classifier.load_state_dict({k: file.get_tensor(f"linear.{k}") for k in ("weight", "bias")})
    images, labels = _cifar10(root)
    x = torch.from_numpy(images.copy()).float() / 255  # normalised inside, as the config.json beside the weights says
    with torch.no_grad():
        found = torch.cat([classifier(net(part)).argmax(1) for part in x.split(250)])
    accuracy = (found == torch.from_numpy(labels).long()).float().mean().item()
    assert accuracy == pytest.approx(published, abs=0.02)


def test_normalising_inside_is_normalising_outside(tmp_path):
    torch.manual_seed(0)
    inside = resnet20((3, 32, 32), normalize="imagenet").eval()
    torch.manual_seed(0)
    plain = resnet20((3, 32, 32)).eval()
    x = torch.rand(2, 3, 32, 32)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    assert torch.equal(inside(x), plain((x - mean) / std))
    assert inside.state_dict().keys() == plain.state_dict().keys()  # weights load as before
    assert torch.equal(resnet20((1, 8, 8), normalize="half").input_mean, torch.full((1, 1, 1), 0.5))
    for shape, how in (((3, 32, 32), "zero"), ((1, 28, 28), "imagenet")):
        with pytest.raises(UserError, match=r"backbone\.normalize"):
            resnet20(shape, normalize=how)


@pytest.mark.skipif("CLPLAT_DATA" not in os.environ, reason="needs a data root")
def test_pretrained_resnet20_with_its_head_knows_cifar10():
    from clplat.backbones.base import Classifier
    from clplat.backbones.heads import Linear
    from clplat.data.datasets import load_images

    root = os.environ["CLPLAT_DATA"]
    path = str(Path(root) / "weights" / "cifar10_resnet20" / "model.safetensors")
    model = Classifier(resnet20((3, 32, 32), path, "imagenet"), Linear(64, 10, path)).eval()
    test = load_images("cifar10", root)[1]
    with torch.no_grad():
        right = (model(test.images[:500].float() / 255).argmax(1) == test.labels[:500]).float().mean()
    assert right > 0.88  # 91.72 % of the whole test set


def test_a_strided_convolution_of_one_pixel_has_the_gradient_of_its_middle():
    """Whatever lies in memory: oneDNN's kernel for AMX reads some of it in bfloat16."""
    torch.manual_seed(0)
    layer, x = Convolution(8, 16, 2), torch.randn(5, 8, 1, 1)
    for _ in range(20):
        layer.zero_grad()
        torch.full((20_000,), torch.nan)  # which is let go at once
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(x)
        assert out.shape == (5, 16, 1, 1)
        out.float().sum().backward()
        expected = torch.zeros(16, 8, 3, 3)
        expected[:, :, 1, 1] = x.bfloat16().float().sum((0, 2, 3))
        torch.testing.assert_close(layer.weight.grad, expected, atol=0.05, rtol=0.02)
    torch.testing.assert_close(layer(x), nn.functional.conv2d(x, layer.weight, None, 2, 1))
    y = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(layer(y), nn.functional.conv2d(y, layer.weight, None, 2, 1))
