"""Masked objectives: a backbone learns, without labels, to tell what was hidden from it by what it was shown.

Source   He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, arXiv:2111.06377.
    x_1 ... x_L patches of an image;  z = encoder(class token, x_p of p ∈ V),   V drawn anew, |V| = ⌊(1 − ratio) L⌋
    y = decoder(W z at its places, a learned token m at the others, + positions)
    loss = mean over p ∉ V of mean (y_p − (x_p − mean x_p) / √(var x_p + 10⁻⁶))²        mean, var of a patch's numbers
Checked  against ViTMAEForPreTraining of transformers: losses agree, and features where nothing is hidden.
Differs  the decoder is new and small (theirs: 8 blocks of 512), and a class token comes to it without a position.

Shapes: B images of a batch, L patches of an image, V of them visible, P numbers of a patch, D features, W of the
decoder.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones.base import Backbone
from clplat.components.precision import wide
from clplat.errors import UserError

HEAD = 32  # features of each head of the decoder's attention


class Draws(nn.Module):
    """Numbers for the samples of each step, the same however processes and accumulated batches share these out."""

    def __init__(self) -> None:
        super().__init__()
        self.seed, self.step = int(torch.randint(2**31, ())), 0  # equal on all processes, which were seeded alike
        self._given = 0  # samples of this step that have theirs

    def forward(self, numbers: int, samples: int, rank: int = 0, world_size: int = 1) -> Tensor:
        """Uniform in [0, 1), (B, numbers) on the CPU, for this process's part of a batch of `samples` over all."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        drawn = torch.rand(self._given + samples, numbers, generator=generator)[self._given :]
        self._given += samples
        return drawn.tensor_split(world_size)[rank]

    def advance(self) -> None:
        """To the next step."""
        self.step, self._given = self.step + 1, 0

    def get_extra_state(self) -> dict[str, int]:
        return {"seed": self.seed, "step": self.step}

    def set_extra_state(self, state: dict[str, int]) -> None:
        self.seed, self.step, self._given = state["seed"], state["step"], 0


class MaskedPatches(nn.Module):
    """The decoder that completes images from what a vision transformer of timm makes of some of their patches.

    Args:
        backbone: whose passes are taken; no part of this module.
        ratio: share of the patches that are hidden, in (0, 1); one at least is, and one at least is not.
        width: W, a multiple of 32.
        depth: blocks, ≥ 1.

    Raises:
        UserError: the backbone is another one, or its images are too few numbers.
    """

    positions: Tensor

    def __init__(self, backbone: Backbone, ratio: float, width: int, depth: int) -> None:
        super().__init__()
        net, (side, rows, columns) = _patched(backbone)
        self.patch, self.count = side, rows * columns
        self.visible = min(max(int(self.count * (1 - ratio)), 1), self.count - 1)
        numbers = net.patch_embed.proj.in_channels * side**2
        self.enter, self.norm = nn.Linear(backbone.embed_dim, width), nn.LayerNorm(width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(width, width // HEAD, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(depth)
        )
        self.leave = nn.Linear(width, numbers)
        self.token = nn.Parameter(torch.empty(width))
        nn.init.normal_(self.token, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        self.register_buffer("positions", waves(rows, columns, width), persistent=False)

    def forward(self, backbone: Backbone, inputs: Tensor, noise: Tensor) -> Tensor:
        """Losses (B,) of inputs (B, ...); of each image the patches of the least noise (B, L) are visible."""
        order = noise.to(inputs.device).argsort(1)
        images, states = shown(backbone, inputs, order[:, : self.visible])
        errors = (wide(self._completed(states, order)) - self._targets(images)).square().mean(2)  # (B, L)
        return errors.gather(1, order[:, self.visible :]).mean(1)

    def _completed(self, states: Tensor, order: Tensor) -> Tensor:
        """Patches (B, L, P) by states (B, prefix + V, D) of the first V of `order` (B, L)."""
        z = self.enter(states)
        places, front = order[:, : self.visible, None].expand(-1, -1, z.shape[2]), z.shape[1] - self.visible
        blank = self.token.to(z.dtype).expand(len(z), self.count, -1)
        full = blank.scatter(1, places, z[:, front:]) + self.positions.to(z.dtype)
        y = torch.cat([z[:, :front], full], dim=1)
        for block in self.blocks:
            y = block(y)
        return self.leave(self.norm(y))[:, front:]

    def _targets(self, images: Tensor) -> Tensor:
        """Patches (B, L, P) of images (B, C, H, W), each of mean 0 and variance 1."""
        patches = F.unfold(wide(images), self.patch, stride=self.patch).transpose(1, 2)
        return (patches - patches.mean(2, keepdim=True)) / (patches.var(2, keepdim=True) + 1e-6).sqrt()


def shown(backbone: Backbone, inputs: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """A pass that is given only the patches `kept` (B, V) of each image of inputs (B, ...), at their own places.

    Returns:
        The images (B, C, H, W) as the backbone cuts them into patches, and its states (B, prefix + V, D) behind its
        last normalisation: of the tokens in front (class, registers), then of the patches as `kept` orders them.
    """
    net, _ = _patched(backbone)
    found: dict[str, Tensor] = {}
    front = net.num_prefix_tokens

    def choose(_: Any, given: tuple[Tensor, ...], __: Any) -> Tensor:
        tokens = given[0]  # (B, prefix + L, D)
        return torch.cat(
            [tokens[:, :front], tokens[:, front:].gather(1, kept[..., None].expand(-1, -1, tokens.shape[2]))], dim=1
        )

    handles = [
        net.patch_embed.register_forward_pre_hook(lambda _, given: found.update(images=given[0])),
        net.patch_drop.register_forward_hook(choose),
        net.norm.register_forward_hook(lambda _, __, states: found.update(states=states)),
    ]
    try:
        backbone(inputs)
    finally:
        for handle in handles:
            handle.remove()
    assert found["states"].shape[1] == front + kept.shape[1], "this transformer does not ask its patch_drop"
    return found["images"], found["states"]


def _patched(backbone: Any) -> tuple[Any, tuple[int, int, int]]:
    """The transformer of a backbone; side of its patches, and how many rows and columns of them there are.

    Raises:
        UserError: as `MaskedPatches` does.
    """
    from timm.layers import PatchEmbed
    from timm.models import VisionTransformer

    net = getattr(backbone, "net", None)
    if not isinstance(net, VisionTransformer) or not isinstance(net.patch_embed, PatchEmbed):
        raise UserError(
            "backbone: has no patches that can be hidden (valid: vit, vit_tiny, vit_micro, or a ViT of timm)"
        )
    embed: Any = net.patch_embed
    (side, other), (rows, columns) = embed.patch_size, embed.grid_size
    if side != other or rows * columns < 2 or embed.proj.in_channels * side**2 < 2:
        raise UserError(
            f"backbone.patch_size: {rows} x {columns} patches of {side} x {other} can't be hidden in part (valid: two "
            "patches at least, square, of two numbers at least)"
        )
    return net, (side, rows, columns)


def waves(rows: int, columns: int, width: int) -> Tensor:
    """Positions (rows · columns, width) of a grid, row by row: sines and cosines of the column, then of the row."""
    rates = 10_000 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    y, x = torch.meshgrid(torch.arange(rows).double(), torch.arange(columns).double(), indexing="ij")
    angles = [place.flatten()[:, None] * rates for place in (x, y)]
    return torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1).float()
