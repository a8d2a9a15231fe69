import math

import pytest
import torch
from timm.models import VisionTransformer
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


def test_a_loss_does_not_depend_on_the_rest_of_the_batch():
    net, x, noise = backbone(), images(), torch.rand(3, COUNT)
    decoder = masked(net)
    whole = decoder(net, x, noise)
    torch.testing.assert_close(torch.cat([decoder(net, x[i, None], noise[i, None]) for i in range(3)]), whole)


@pytest.mark.parametrize(("ratio", "visible"), [(0.75, 4), (0.7, 4), (0.999, 1), (0.001, 15), (0.5, 8)])
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


@pytest.mark.parametrize("net", [mlp((3, 8, 8), [16]), slim_resnet18((3, 8, 8), width=2)])
def test_other_backbones_are_refused(net):
    with pytest.raises(UserError, match="backbone: has no patches that can be hidden"):
        MaskedPatches(net, 0.75, 64, 1)


@pytest.mark.parametrize(("shape", "patch"), [((3, 8, 8), 8), ((1, 8, 8), 1)])
def test_too_few_numbers_are_refused(shape, patch):
    with pytest.raises(UserError, match=f"backbone.patch_size: .* patches of {patch} x {patch} can't be hidden"):
        MaskedPatches(vit_micro(shape, patch_size=patch), 0.75, 64, 1)
