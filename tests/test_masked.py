import math
from functools import partial

import pytest
import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer_hybrid import HybridEmbed
from torch import nn

from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.mlp import mlp
from clplat.backbones.vit import ViT, vit_micro
from clplat.components.masked import Draws, MaskedPatches, shown
from clplat.errors import UserError

SIDE, GRID, DIM, WIDTH = 2, 4, 16, 64
COUNT = GRID**2


def backbone(**more):
    """A small transformer with a class token, in double precision."""
    torch.manual_seed(0)
    sizes = {"img_size": SIDE * GRID, "patch_size": SIDE, "embed_dim": DIM, "depth": 2, "num_heads": 2}
    net = VisionTransformer(**sizes, num_classes=0, **more)
    for parameter in net.parameters():  # norms and biases that do something
        nn.init.normal_(parameter, std=0.3)
    return ViT(net).double().eval()


def images(count=3):
    return torch.rand(count, 3, SIDE * GRID, SIDE * GRID, dtype=torch.float64)


def masked(net, ratio=0.75, depth=2):
    decoder = MaskedPatches(net, ratio, WIDTH, depth).double()
    for parameter in decoder.parameters():
        nn.init.normal_(parameter, std=0.1)
    return decoder


# --- what the encoder is shown ----------------------------------------------------------------------------------------


def changed(x, patch):
    """Images whose patch number `patch` is another one."""
    row, column = divmod(patch, GRID)
    x = x.clone()
    x[:, :, SIDE * row : SIDE * (row + 1), SIDE * column : SIDE * (column + 1)] += 1
    return x


def test_only_what_is_visible_reaches_the_encoder():
    net, x, kept = backbone(), images(), torch.tensor([[5, 0, 11], [2, 3, 4], [15, 5, 1]])
    _, states = shown(net, x, kept)
    assert states.shape == (3, 1 + 3, DIM)
    for patch in range(COUNT):
        _, other = shown(net, changed(x, patch), kept)
        same = [torch.equal(a, b) for a, b in zip(states, other, strict=True)]
        assert same == [patch not in row for row in kept.tolist()]


@pytest.mark.parametrize("more", [{}, {"reg_tokens": 2}, {"class_token": False, "global_pool": "avg"}])
def test_shown_everything_it_is_the_backbones_own_pass(more):
    net, x = backbone(**more), images()
    before = net(x)
    order = torch.randperm(COUNT)
    cut, states = shown(net, x, order.expand(3, -1))
    whole = net.net.forward_features(x)
    front = net.net.num_prefix_tokens
    torch.testing.assert_close(states[:, :front], whole[:, :front])
    torch.testing.assert_close(states[:, front:], whole[:, front:][:, order])
    assert torch.equal(cut, x)
    assert torch.equal(net(x), before)  # later passes see all patches again


def test_images_are_cut_as_the_backbone_normalises_them():
    net, x = backbone().normalizing("half", 3).double(), images()
    cut, _ = shown(net, x, torch.zeros(3, 1, dtype=torch.int64))
    torch.testing.assert_close(cut, 2 * x - 1)


# --- the loss ---------------------------------------------------------------------------------------------------------


def normed(layer, x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + layer.eps).sqrt() * (
        layer.weight
    ) + layer.bias


def attended(layer, x, heads):
    """Tokens (T, W) of one image."""
    q, k, v = (x @ layer.in_proj_weight.T + layer.in_proj_bias).chunk(3, dim=1)
    found = []
    for h in range(heads):
        part = slice(h * WIDTH // heads, (h + 1) * WIDTH // heads)
        scores = q[:, part] @ k[:, part].T / math.sqrt(WIDTH / heads)
        found.append(scores.softmax(1) @ v[:, part])
    return layer.out_proj(torch.cat(found, dim=1))


def place(row, column):
    """Position of a patch: sines and cosines of its column, then of its row."""
    rates = [10_000 ** (-i / (WIDTH / 4)) for i in range(WIDTH // 4)]
    return torch.tensor(
        [f(p * r) for p in (column, row) for f in (math.sin, math.cos) for r in rates], dtype=torch.float64
    )


def by_hand(net, decoder, image, noise):
    """The loss of one image, patch by patch, in double precision."""
    inner = net.net
    visible = noise.argsort()[: int(COUNT * 0.25)].tolist()
    tokens = inner.patch_embed(image[None])[0]  # (L, D)
    states = torch.stack([inner.cls_token[0, 0] + inner.pos_embed[0, 0]]
                         + [tokens[p] + inner.pos_embed[0, 1 + p] for p in visible])  # fmt: skip
    states = inner.norm(inner.blocks(states[None]))[0]
    z = states @ decoder.enter.weight.T + decoder.enter.bias
    y = [z[0]]
    for p in range(COUNT):
        what = z[1 + visible.index(p)] if p in visible else decoder.token
        y.append(what + place(*divmod(p, GRID)))
    y = torch.stack(y)
    for block in decoder.blocks:
        y = y + attended(block.self_attn, normed(block.norm1, y), WIDTH // 32)
        inside = normed(block.norm2, y) @ block.linear1.weight.T + block.linear1.bias
        y = y + (0.5 * inside * (1 + torch.erf(inside / math.sqrt(2)))) @ block.linear2.weight.T + block.linear2.bias
    y = normed(decoder.norm, y) @ decoder.leave.weight.T + decoder.leave.bias
    losses = []
    for p in (p for p in range(COUNT) if p not in visible):
        row, column = divmod(p, GRID)
        target = image[:, SIDE * row : SIDE * (row + 1), SIDE * column : SIDE * (column + 1)].flatten()
        target = (target - target.mean()) / (target.var() + 1e-6).sqrt()
        losses.append(((y[1 + p] - target) ** 2).mean())
    return torch.stack(losses).mean()


def test_loss_by_hand():
    net, x, noise = backbone(), images(), torch.rand(3, COUNT)
    decoder = masked(net)
    losses = decoder(net, x, noise)
    expected = torch.stack([by_hand(net, decoder, *each) for each in zip(x, noise, strict=True)])
    torch.testing.assert_close(losses, expected, atol=1e-6, rtol=0)  # positions are kept in single precision
    assert losses.std() > 0
    parameters = [*decoder.parameters(), *net.net.patch_embed.parameters()]
    mine, theirs = (torch.autograd.grad(each.sum(), parameters) for each in (losses, expected))
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def as_theirs(layer):
    """Linear layers (q, k, v, out, fc1, fc2) and norms of a layer of transformers, in this order."""
    return ([m for m in layer.modules() if isinstance(m, kind)] for kind in (nn.Linear, nn.LayerNorm))


def taken(target, *sources):
    """Weights and biases of `target`, one below the other from `sources`."""
    target.weight.copy_(torch.cat([s.weight for s in sources]))
    target.bias.copy_(torch.cat([s.bias for s in sources]))


@torch.no_grad()
def test_loss_is_that_of_transformers():
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    sizes = {"hidden_size": DIM, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 4 * DIM}
    small = {"decoder_hidden_size": WIDTH, "decoder_num_hidden_layers": 2, "decoder_num_attention_heads": WIDTH // 32}
    config = ViTMAEConfig(
        **sizes, **small, decoder_intermediate_size=4 * WIDTH, image_size=SIDE * GRID, patch_size=SIDE, mask_ratio=0.75,
        norm_pix_loss=True, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs, net = ViTMAEForPreTraining(config).double().eval(), backbone()
    decoder = masked(net)
    theirs.decoder.decoder_pos_embed.copy_(torch.cat([torch.zeros(1, WIDTH), decoder.positions]))
    for name, parameter in theirs.named_parameters():
        if "pos" not in name:
            nn.init.normal_(parameter, std=0.3)
    inner, vit = net.net, theirs.vit
    inner.cls_token.copy_(vit.embeddings.cls_token)
    inner.pos_embed.copy_(vit.embeddings.position_embeddings)
    taken(inner.patch_embed.proj, vit.embeddings.patch_embeddings.projection)
    taken(inner.norm, vit.layernorm)
    for mine, layer in zip(inner.blocks, vit.layers, strict=True):
        (q, k, v, out, fc1, fc2), norms = as_theirs(layer)
        taken(mine.attn.qkv, q, k, v)
        for target, source in zip((mine.attn.proj, mine.mlp.fc1, mine.mlp.fc2, mine.norm1, mine.norm2),
                                  (out, fc1, fc2, *norms), strict=True):  # fmt: skip
            taken(target, source)
    taken(decoder.enter, theirs.decoder.decoder_embed)
    decoder.token.copy_(theirs.decoder.mask_token[0, 0])
    taken(decoder.norm, theirs.decoder.decoder_norm)
    decoder.norm.eps = 1e-6
    for mine, layer in zip(decoder.blocks, theirs.decoder.decoder_layers, strict=True):
        (q, k, v, out, fc1, fc2), norms = as_theirs(layer)
        mine.self_attn.in_proj_weight.copy_(torch.cat([q.weight, k.weight, v.weight]))
        mine.self_attn.in_proj_bias.copy_(torch.cat([q.bias, k.bias, v.bias]))
        mine.norm1.eps = mine.norm2.eps = 1e-6
        for target, source in zip((mine.self_attn.out_proj, mine.linear1, mine.linear2, mine.norm1, mine.norm2),
                                  (out, fc1, fc2, *norms), strict=True):  # fmt: skip
            taken(target, source)
    order = torch.arange(3 * SIDE**2).view(SIDE, SIDE, 3).permute(2, 0, 1).flatten()  # their channels come last
    decoder.leave.weight.copy_(theirs.decoder.decoder_pred.weight[order])
    decoder.leave.bias.copy_(theirs.decoder.decoder_pred.bias[order])
    x, noise = images(), torch.rand(3, COUNT, dtype=torch.float64)
    expected = theirs(x, noise=noise).loss
    torch.testing.assert_close(decoder(net, x, noise).mean(), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(net(x), vit.layernorm(hidden_of(vit, x))[:, 0], atol=1e-6, rtol=0)


def hidden_of(vit, x):
    """States of all patches, none hidden, before the last normalisation."""
    patches = vit.embeddings.patch_embeddings(x) + vit.embeddings.position_embeddings[:, 1:]
    front = (vit.embeddings.cls_token + vit.embeddings.position_embeddings[:, :1]).expand(len(x), -1, -1)
    states = torch.cat([front, patches], dim=1)
    for layer in vit.layers:
        found = layer(states)
        states = found[0] if isinstance(found, tuple) else found
    return states


def test_a_loss_does_not_depend_on_the_rest_of_the_batch():
    net, x, noise = backbone(), images(), torch.rand(3, COUNT)
    decoder = masked(net)
    whole = decoder(net, x, noise)
    torch.testing.assert_close(torch.cat([decoder(net, x[i, None], noise[i, None]) for i in range(3)]), whole)


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 4), (0.7, 4), (0.999, 1), (0.001, 15), (0.5, 8), (1e-18, 15)])
def test_how_many_are_visible(ratio, visible):
    assert masked(backbone(), ratio).visible == visible


# --- what is drawn ----------------------------------------------------------------------------------------------------


def test_draws_do_not_depend_on_how_a_step_is_shared_out():
    draws = Draws()
    before = torch.get_rng_state()
    whole = draws(5, 7)
    assert whole.shape == (7, 5)
    assert 0 <= whole.min() < whole.max() < 1
    draws.advance()
    later = draws(5, 7)
    assert not torch.equal(later, whole)
    draws.set_extra_state({**draws.get_extra_state(), "step": 0})
    assert torch.equal(torch.cat([draws(5, 4), draws(5, 3)]), whole)  # accumulated
    parts = []
    for rank in range(2):
        draws.set_extra_state({**draws.get_extra_state(), "step": 1})
        parts.append(draws(5, 7, rank, 2))
    assert [len(part) for part in parts] == [4, 3]
    assert torch.equal(torch.cat(parts), later)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_go_on_from_their_state():
    one, other = Draws(), Draws()
    one.advance()
    assert one.seed != other.seed
    other.set_extra_state(one.get_extra_state())
    assert torch.equal(one(3, 2), other(3, 2))


# --- refusals ---------------------------------------------------------------------------------------------------------


def behind_a_convolution():
    return backbone(embed_layer=partial(HybridEmbed, backbone=nn.Conv2d(3, 4, 3, padding=1)))


@pytest.mark.parametrize("make", [partial(mlp, (3, 8, 8), [16]), partial(slim_resnet18, (3, 8, 8), width=2),
                                  behind_a_convolution])  # fmt: skip
def test_other_backbones_are_refused(make):
    net = make()
    with pytest.raises(UserError, match="backbone: has no patches that can be hidden"):
        MaskedPatches(net, 0.75, 64, 1)


@pytest.mark.parametrize(("shape", "patch"), [((3, 8, 8), 8), ((1, 8, 8), 1)])
def test_too_few_numbers_are_refused(shape, patch):
    with pytest.raises(UserError, match=f"backbone.patch_size: .* patches of {patch} x {patch} can't be hidden"):
        MaskedPatches(vit_micro(shape, patch_size=patch), 0.75, 64, 1)
