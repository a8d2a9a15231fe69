import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

from clplat.backbones.base import Classifier
from clplat.backbones.heads import Linear
from clplat.backbones.vit import suited_patch, vit, vit_micro, vit_tiny
from clplat.errors import MissingError, UserError


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32)])
@pytest.mark.parametrize(("make", "dim", "blocks"), [(vit_tiny, 192, 3), (vit_micro, 64, 3)])
def test_shapes_gradients_and_blocks(make, dim, blocks, shape):
    net = make(shape, depth=blocks)
    features = net(torch.randn(2, *shape))
    assert features.shape == (2, dim)
    assert net.embed_dim == dim
    assert len(net.blocks) == blocks
    (features * torch.randn(2, dim)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in net.parameters())


def test_vit_tiny_has_the_size_of_deit_tiny():
    net = vit_tiny((3, 224, 224))
    assert sum(p.numel() for p in net.parameters()) + 192 * 1000 + 1000 == 5_717_416
    assert len(net.blocks) == 12
    assert net.net.patch_embed.patch_size == (16, 16)


@pytest.mark.parametrize(("side", "patch"), [(8, 2), (15, 1), (28, 4), (32, 4), (64, 8), (224, 16), (225, 1)])
def test_suited_patch(side, patch):
    assert suited_patch((side, side)) == patch


def test_features_are_what_timm_gives_before_its_classifier():
    net = vit((3, 224, 224), depth=1).eval()
    x = torch.randn(1, 3, 224, 224)
    assert torch.equal(net(x), net.net(x))  # timm's own forward, its classifier being the identity


@pytest.mark.parametrize("make", [vit_tiny, vit_micro])
def test_layers_by_role(make):
    net = make((1, 8, 8), depth=2)
    attention, ffn = net.layers("attention"), net.layers("ffn")
    assert list(attention) == [f"net.blocks.{i}.attn.{n}" for i in range(2) for n in ("qkv", "proj")]
    assert list(ffn) == [f"net.blocks.{i}.mlp.{n}" for i in range(2) for n in ("fc1", "fc2")]
    for name, layer in {**attention, **ffn}.items():
        assert net.get_submodule(name) is layer
        assert isinstance(layer, nn.Linear)
    assert attention["net.blocks.0.attn.qkv"].out_features == 3 * net.embed_dim
    assert ffn["net.blocks.1.mlp.fc1"].out_features == 4 * net.embed_dim


@pytest.mark.parametrize(
    "model",
    ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224", "vit_small_patch32_224.augreg_in21k", "test_vit"],
)
def test_any_timm_name(model):
    net = vit((1, 32, 32), model, depth=1)
    assert net(torch.randn(2, 1, 32, 32)).shape == (2, net.embed_dim)
    assert net.layers("attention")
    assert net.layers("ffn")


def test_unknown_names_get_the_nearest():
    with pytest.raises(UserError, match=r"vit_tiny_patch16_223.*nearest: vit_tiny_patch16_224"):
        vit((3, 32, 32), "vit_tiny_patch16_223")
    with pytest.raises(UserError, match="timm has no vision transformer 'resnet18'"):
        vit((3, 32, 32), "resnet18")
    with pytest.raises(UserError, match=r"no weights 'augreg'.*augreg_in21k"):
        vit((3, 32, 32), "vit_tiny_patch16_224.augreg")


def test_sizes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=r"backbone\.patch_size: 16 .*28x28: 1, 2, 4, 7, 14, 28"):
        vit((1, 28, 28))
    with pytest.raises(UserError, match=r"backbone\.patch_size: 3"):
        vit_micro((1, 8, 8), patch_size=3)
    with pytest.raises(UserError, match=r"backbone\.patch_size: 0"):
        vit_tiny((1, 8, 8), patch_size=0)
    with pytest.raises(UserError, match=r"\(64,\)"):
        vit_tiny((64,))
    with pytest.raises(UserError, match=r"backbone\.image_size: 0"):
        vit((1, 8, 8), image_size=0)
    with pytest.raises(UserError, match=r"backbone\.image_size: 0"):
        vit_tiny((1, 8, 8), image_size=0)
    with pytest.raises(UserError, match=r"backbone\.dim: 66.*multiple of heads = 4"):
        vit_micro((1, 8, 8), dim=66)
    with pytest.raises(UserError, match=r"backbone\.depth: 0"):
        vit_tiny((1, 8, 8), depth=0)


def test_inputs_are_resized_where_asked():
    net = vit_tiny((1, 8, 8), image_size=32, depth=1).eval()
    assert net.net.patch_embed.grid_size == (8, 8)
    x = torch.rand(2, 1, 8, 8)
    larger = F.interpolate(x, (32, 32), mode="bilinear", antialias=True)
    assert torch.equal(net(x), net.net(larger))


def test_weights_from_a_path(tmp_path):
    path = tmp_path / "w.safetensors"
    source = vit((3, 32, 32), depth=2)
    classifier = {"head.weight": torch.zeros(10, 192), "head.bias": torch.zeros(10)}
    save_file({**source.net.state_dict(), **classifier}, path)

    same = vit((3, 32, 32), weights=str(path), depth=2)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(same.eval()(x), source.eval()(x))

    first = vit((3, 32, 32), weights=str(path), depth=1)
    qkv = "net.blocks.0.attn.qkv.weight"
    assert torch.equal(first.state_dict()[qkv], source.state_dict()[qkv])

    grey = vit((1, 32, 32), weights=str(path), depth=2)
    stem = "net.patch_embed.proj.weight"
    assert torch.allclose(grey.state_dict()[stem], source.state_dict()[stem].sum(1, keepdim=True))

    small = vit((3, 8, 8), weights=str(path), patch_size=2, depth=2)
    assert small.eval()(torch.randn(2, 3, 8, 8)).isfinite().all()
    assert torch.equal(small.state_dict()[qkv], source.state_dict()[qkv])

    with pytest.raises(UserError, match=r"lacks blocks\.2"):
        vit((3, 32, 32), weights=str(path), depth=3)
    with pytest.raises(UserError, match="does not fit"):
        vit((3, 32, 32), "test_vit", weights=str(path), depth=2)


def test_pretrained_without_a_network_says_which_file_to_put_where(tmp_path, monkeypatch):
    import huggingface_hub

    def unreachable(*args, **kwargs):
        raise OSError("no network")

    def not_cached(*args, local_files_only=False, **kwargs):
        assert local_files_only
        raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", unreachable)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", not_cached)
    with pytest.raises(MissingError, match=r"timm/deit_tiny_patch16_224\.fb_in1k/resolve/main/model\.safetensors"):
        vit_tiny((3, 32, 32), weights="pretrained")
    with pytest.raises(MissingError, match=r"put it at weights/vit_tiny_patch16_224\.augreg_in21k\.safetensors"):
        vit((3, 32, 32), "vit_tiny_patch16_224.augreg_in21k", weights="pretrained")
    with pytest.raises(MissingError, match="put the weights there"):
        vit((3, 32, 32), weights=str(tmp_path / "none.safetensors"))
    with pytest.raises(UserError, match="the hub has none"):
        vit((3, 224, 224), "vit_huge_patch14_gap_224.in1k_ijepa", weights="pretrained")


def test_pretrained_is_read_from_the_cache_before_the_network(tmp_path, monkeypatch):
    import huggingface_hub

    path = tmp_path / "model.safetensors"
    source = vit_tiny((3, 32, 32), depth=1)
    save_file(source.net.state_dict(), path)
    asked = []
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *a, **k: asked.append((a, k)) or str(path))
    net = vit_tiny((3, 32, 32), weights="pretrained", depth=1)
    assert asked == [(("timm/deit_tiny_patch16_224.fb_in1k", "model.safetensors"), {"local_files_only": True})]
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), source.parameters(), strict=True))


def test_vit_micro_learns_digits_in_seconds():
    from sklearn.datasets import load_digits

    digits = load_digits()
    x, y = torch.tensor(digits.images).float().unsqueeze(1) / 16, torch.tensor(digits.target)
    train, test = torch.randperm(len(x)).tensor_split([1437])
    model = Classifier(vit_micro((1, 8, 8)), Linear(64, 10))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(5):
        for rows in train[torch.randperm(len(train))].split(32):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        accuracy = (model.eval()(x[test]).argmax(1) == y[test]).float().mean().item()
    assert accuracy > 0.9
