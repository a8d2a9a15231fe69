"""Models of timm by name: what clplat makes of them is what timm computes, with the preprocessing of the weights."""

from __future__ import annotations

import json

import pytest
import timm as library
import torch
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import functional as T

from clplat.backbones.base import Classifier
from clplat.backbones.heads import Linear
from clplat.backbones.timm import timm
from clplat.backbones.vit import vit
from clplat.errors import MissingError, UserError

CONV, TRANSFORMER = "test_resnet", "test_vit"
SMALL = (CONV, TRANSFORMER, "test_efficientnet", "test_convnext", "test_maxvit", "test_mambaout", "test_byobnet")
OWN = {"architecture": CONV, "num_classes": 5, "pretrained_cfg": {
    "input_size": [3, 48, 48], "crop_pct": 0.75, "interpolation": "bilinear", "crop_mode": "center",
    "mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}}  # fmt: skip


@pytest.fixture
def folder(tmp_path):
    """Weights of a small convolutional network with five classes, as timm puts them on the hub."""
    torch.manual_seed(1)
    net = library.create_model(CONV, num_classes=5)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(OWN))
    return tmp_path, net.eval()


def prepared(x, side, crop, interpolation, mean, std):
    """timm's transforms of evaluation, on tensors in [0, 1]."""
    how = T.InterpolationMode(interpolation)
    x = T.center_crop(T.resize(x, int(side / crop), how, antialias=True), [side, side]).clamp(0, 1)
    return (x - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


@pytest.mark.parametrize("name", SMALL)
def test_features_are_what_timms_classifier_is_given(name):
    net = timm((3, 64, 64), name).eval()
    x = torch.rand(2, 3, 64, 64)
    assert torch.equal(net(x), net.net(x))  # whose classifier is the identity
    assert net(x).shape == (2, net.embed_dim)
    assert net.blocks
    assert net.training is False
    assert timm((3, 64, 64), name).net.training


@pytest.mark.parametrize("name", SMALL)
def test_blocks_are_run_in_their_order_and_put_out_tensors(name):
    net, ran = timm((3, 64, 64), name), []
    for number, block in enumerate(net.blocks):
        block.register_forward_hook(lambda *_, n=number: ran.append(n))
    with net.recorded() as states:
        net(torch.rand(2, 3, 64, 64))
    assert ran == list(range(len(net.blocks)))
    assert [o.shape[0] for o in states.outputs] == [2] * len(ran)


def test_layers_by_role():
    roles = {name: [net.layers(r) for r in ("attention", "ffn")] for name in SMALL if (net := timm((3, 64, 64), name))}
    assert {n.rpartition(".")[2] for n in roles[TRANSFORMER][0]} == {"qkv", "proj"}
    assert {n.rpartition(".")[2] for n in roles[TRANSFORMER][1]} == {"fc1", "fc2"}
    assert [len(layers) for layers in roles[CONV]] == [0, 0]
    assert not roles["test_convnext"][0]
    assert len(roles["test_convnext"][1]) == 2 * len(timm((3, 64, 64), "test_convnext").blocks)
    assert {n.rpartition(".")[2] for n in roles["test_maxvit"][0]} == {"qkv", "proj"}  # and no position biases
    same = vit((3, 64, 64), TRANSFORMER, patch_size=16)
    assert [list(same.layers(r)) for r in ("attention", "ffn")] == [list(layers) for layers in roles[TRANSFORMER]]


def test_a_transformer_is_the_one_that_vit_makes():
    torch.manual_seed(0)
    one = timm((3, 64, 64), TRANSFORMER).eval()
    torch.manual_seed(0)
    other = vit((3, 64, 64), TRANSFORMER).eval()
    x = torch.rand(2, 3, 64, 64)
    assert list(one.state_dict()) == list(other.state_dict())
    assert torch.equal(one(x), other(x))


def test_a_folder_is_loaded_as_a_whole_and_its_preprocessing_is_the_default(folder):
    path, net = folder
    mine = Classifier(timm((3, 20, 30), weights=str(path)), Linear(96, 5, weights=str(path))).eval()
    x = torch.rand(4, 3, 20, 30)
    own = OWN["pretrained_cfg"]
    expected = net(prepared(x, 48, 0.75, "bilinear", own["mean"], own["std"]))
    torch.testing.assert_close(mine(x), expected, atol=1e-5, rtol=1e-5)
    assert mine.backbone.notes == (
        "backbone: images of 20x30 are scaled to 64x96 (bilinear), and their middle 48x48 cut out",
    )


def test_preprocessing_can_be_told_and_is_left_out_for_images_of_the_right_size(folder):
    path, net = folder
    x = 0.3 + 0.4 * torch.rand(2, 3, 48, 48)  # which bicubic scaling does not take out of [0, 1]
    half = timm((3, 48, 48), weights=str(path), normalize="half").eval()
    assert half.notes == ()
    net.reset_classifier(0)
    torch.testing.assert_close(half(x), net((x - 0.5) / 0.5), atol=1e-5, rtol=1e-5)
    told = timm((3, 48, 48), weights=str(path), image_size=32, crop=0.5, interpolation="bicubic", normalize="imagenet")
    expected = prepared(x, 32, 0.5, "bicubic", [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(told.eval()(x), net(expected), atol=1e-5, rtol=1e-5)


def test_bicubic_scaling_does_not_leave_the_range_of_images(folder):
    path, _ = folder
    edge = (torch.arange(8) >= 4).float().expand(1, 3, 8, 8)
    fit = timm((3, 8, 8), weights=str(path), interpolation="bicubic").fit
    assert fit(edge, bounded=True).aminmax() == (0, 1)
    assert fit(edge, bounded=False).max() > 1  # where the stream normalises, there is no such range


def test_random_weights_take_images_as_they_are():
    net = timm((1, 32, 32), CONV)
    assert (net.fit, net.input_mean, net.expects) == (None, None, None)
    assert timm((1, 32, 32), CONV, image_size=64).fit.scaled == (64, 64)


def test_grey_images_sum_the_colours(folder):
    path, net = folder
    grey = timm((1, 48, 48), weights=str(path), normalize="none").eval()
    net.reset_classifier(0)
    x = torch.rand(2, 1, 48, 48)
    torch.testing.assert_close(grey(x), net(x.expand(-1, 3, -1, -1)), atol=1e-5, rtol=1e-5)


def test_weights_that_do_not_fit_are_refused(folder):
    path, net = folder
    state = net.state_dict()
    config = path / "config.json"
    with pytest.raises(UserError, match=r"backbone\.model: 'resnet18', but .*config\.json says 'test_resnet'"):
        timm((3, 48, 48), "resnet18", weights=str(path))
    config.write_text(json.dumps({**OWN, "architecture": "resnet10t"}))
    with pytest.raises(UserError, match=r"does not fit resnet10t: .*state_dict"):
        timm((3, 48, 48), weights=str(path))
    config.write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(UserError, match=r"backbone\.model: null, but .*names none"):
        timm((3, 48, 48), weights=str(path))
    config.unlink()
    net = timm((3, 48, 48), CONV, weights=str(path))
    assert "no config.json beside" in net.notes[-1]
    save_file({k: v for k, v in state.items() if k != "layer4.0.conv1.weight"}, path / "model.safetensors")
    with pytest.raises(UserError, match=r"Missing key\(s\) in state_dict: .layer4\.0\.conv1\.weight"):
        timm((3, 48, 48), CONV, weights=str(path))


def test_a_family_that_timm_loads_loosely_is_loaded_strictly(tmp_path):
    net = library.create_model("dla46_c", num_classes=2)
    state = {k: v for k, v in net.state_dict().items() if k != "level2.tree1.conv1.weight"}
    save_file({**state, "spare": torch.zeros(1)}, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"Missing keys \(level2\.tree1\.conv1\.weight\)"):
        timm((3, 64, 64), "dla46_c", weights=str(tmp_path / "w.safetensors"))
    save_file({**net.state_dict(), "spare": torch.zeros(1)}, tmp_path / "w.safetensors")
    notes = timm((3, 64, 64), "dla46_c", weights=str(tmp_path / "w.safetensors")).notes
    assert "Unexpected keys (spare)" in notes[-1]


def test_names_and_sizes_that_there_are_not():
    with pytest.raises(UserError, match=r"timm has no model 'resnet81' \(nearest: resnet18"):
        timm((3, 32, 32), "resnet81")
    with pytest.raises(UserError, match=r"no weights 'a9_in1k' \(nearest: resnet18\.a"):
        timm((3, 32, 32), "resnet18.a9_in1k")
    with pytest.raises(UserError, match=r"backbone\.model: null, but weights random name no model"):
        timm((3, 32, 32))
    with pytest.raises(UserError, match=r"backbone\.image_size: test_vit can't take images of 8x8 .*its own 160"):
        timm((3, 8, 8), TRANSFORMER)
    for key, value in (("image_size", 0), ("crop", 0.0), ("crop", 1.5)):
        with pytest.raises(UserError, match=rf"backbone\.{key}: {value}"):
            timm((3, 32, 32), CONV, **{key: value})


def test_weights_that_are_nowhere_say_what_to_put_where(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(MissingError, match=r"timm/resnet18\.a1_in1k/resolve/main/model\.safetensors where"):
        timm((3, 32, 32), "resnet18", weights="pretrained")
    with pytest.raises(MissingError, match=r"fetch config\.json, model\.safetensors of .*put them in"):
        timm((3, 32, 32), weights="someone/small")
    with pytest.raises(MissingError, match=r"put the weights there, as \.safetensors"):
        timm((3, 32, 32), weights=str(tmp_path / "none.safetensors"))


def test_a_hub_name_is_read_from_the_cache(folder, monkeypatch):
    import huggingface_hub

    path, _ = folder
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: str(path))
    mine, same = (timm((3, 48, 48), weights=source).eval() for source in ("someone/small", str(path)))
    x = torch.rand(2, 3, 48, 48)
    assert torch.equal(mine(x), same(x))
    assert mine.expects == ([0.5, 0.4, 0.3], [0.2, 0.2, 0.1])
