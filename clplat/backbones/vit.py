"""Vision transformers, built by timm.

Source   Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, arXiv:2010.11929; the tiny one: Touvron et al.,
         "Training data-efficient image transformers" (DeiT), ICML 2021, arXiv:2012.12877.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones import _weights
from clplat.backbones.base import Backbone, Normalize, Role, image_shape, require
from clplat.backbones.timm import from_hub, known

if TYPE_CHECKING:
    from timm.models import VisionTransformer

# timm's files whose models are all plain vision transformers: no convolutions before the patches.
_TIMM_FILES = ("vision_transformer", "deit")


class ViT(Backbone):
    """A timm VisionTransformer without its classifier.

    Args:
        net: with `num_classes` 0.
        resize: (height, width) that inputs are resized to first, bilinearly; None where they come in the right size.
    """

    shardable = True
    narrowable = True

    def __init__(self, net: VisionTransformer, resize: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.net, self.resize = net, resize
        self.embed_dim = net.num_features

    @property
    def blocks(self) -> list[nn.Module]:
        return list(self.net.blocks)

    def role(self, name: str) -> Role | None:
        inside = name.partition("blocks.")[2]
        if "attn" in inside:
            return "attention"
        return "ffn" if "mlp" in inside else None

    def features(self, inputs: Tensor) -> Tensor:
        if self.resize is not None:
            inputs = F.interpolate(inputs, self.resize, mode="bilinear", align_corners=False, antialias=True)
        return self.net.forward_head(self.net.forward_features(inputs), pre_logits=True)


def vit(
    input_shape: tuple[int, ...],
    model: str = "vit_tiny_patch16_224",
    weights: str = "random",
    image_size: int | None = None,
    patch_size: int | None = None,
    depth: int | None = None,
    normalize: Normalize | None = None,
) -> Backbone:
    """Any vision transformer of timm by name, of any size of patches: `timm` has all models, and their preprocessing.

    Args:
        input_shape: (channels, height, width).
        model: timm's name, with or without the tag of its weights.
        weights: "random"; "pretrained" (the hub's cache, or else the hub); or the path of a .safetensors file.
            Position and patch embeddings are resampled to the sizes asked for, and colour channels are summed for
            grey images.
        image_size: side in pixels that inputs are resized to; null leaves them as the stream has them.
        patch_size: side of a patch in pixels, a divisor of the image's; null takes the model's own.
        depth: number of blocks, > 0; null takes all, a smaller number the first ones.
        normalize: images in [0, 1] first, by the mean and deviation of imagenet, or by a half, as the weights need.

    Raises:
        UserError: an unknown name, sizes that do not fit, a file that does not.
        MissingError: the weights are neither here nor reachable; says which file to put where.
    """
    channels, height, width = image_shape(input_shape, "vit")
    size = (height, width) if image_size is None else (image_size, image_size)
    arch = known(model, _TIMM_FILES, "vision transformer")
    patch = _own_patch(arch) if patch_size is None else patch_size
    require("image_size", image_size, min(size) > 0, "> 0, or null")
    _check_patch(patch, size)
    require("depth", depth, depth is None or depth > 0, "> 0, or null")

    from timm.models import create_model

    path = from_hub(model) if weights == "pretrained" else weights
    options: dict[str, Any] = {} if depth is None else {"depth": depth}
    net: Any = create_model(arch, num_classes=0, in_chans=channels, img_size=size, patch_size=patch, **options)
    if weights != "random":
        _load(net, path, channels)
    return ViT(net, None if size == (height, width) else size).normalizing(normalize, channels)


def vit_tiny(
    input_shape: tuple[int, ...],
    weights: str = "random",
    image_size: int | None = None,
    patch_size: int | None = None,
    depth: int = 12,
) -> Backbone:
    """DeiT-tiny (192 features, 3 heads, 5.3 million parameters) with patches that suit small images.

    Args:
        input_shape: (channels, height, width).
        weights: "random"; "pretrained" (the hub's cache, or else the hub); or the path of a .safetensors file.
        image_size: side in pixels that inputs are resized to; null leaves them as the stream has them.
        patch_size: side of a patch in pixels, a divisor of the image's; null: 2 below 16 pixels, 4 below 64, 8 below
            128, else 16.
        depth: number of blocks, > 0.
    """
    _, height, width = image_shape(input_shape, "vit_tiny")
    size = (height, width) if image_size is None else (image_size, image_size)
    patch = suited_patch(size) if patch_size is None else patch_size
    return vit(input_shape, "deit_tiny_patch16_224", weights, image_size, patch, depth)


def vit_micro(
    input_shape: tuple[int, ...],
    patch_size: int | None = None,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
) -> Backbone:
    """A transformer small enough to learn 8x8 digits from nothing, on one core, in seconds.

    The features are the mean over patches, which learns faster than a class token where samples are few.

    Args:
        input_shape: (channels, height, width).
        patch_size: side of a patch in pixels, a divisor of the image's; null: as `vit_tiny`.
        dim: features, > 0 and a multiple of `heads`.
        depth: number of blocks, > 0.
        heads: of attention, > 0.
    """
    channels, height, width = image_shape(input_shape, "vit_micro")
    size = (height, width)
    patch = suited_patch(size) if patch_size is None else patch_size
    _check_patch(patch, size)
    require("heads", heads, heads > 0, "> 0")
    require("dim", dim, dim > 0 and dim % heads == 0, f"> 0 and a multiple of heads = {heads}")
    require("depth", depth, depth > 0, "> 0")

    from timm.models import VisionTransformer

    net: Any = VisionTransformer(
        img_size=size,
        patch_size=patch,
        in_chans=channels,
        num_classes=0,
        global_pool="avg",
        class_token=False,
        embed_dim=dim,
        depth=depth,
        num_heads=heads,
        weight_init="jax",
    )
    # timm's 0.02, meant for long training, is drowned by the patches (about 0.3 here): 61 % against 93 % on digits
    # after 4 epochs, together with the initialisation above.
    nn.init.normal_(net.pos_embed, std=0.3)
    return ViT(net)


def suited_patch(size: tuple[int, int]) -> int:
    """Side of a patch for images of `size`: 2 below 16 pixels, 4 below 64, 8 below 128, else 16; less if need be."""
    side = min(size)
    patch = 2 if side < 16 else 4 if side < 64 else 8 if side < 128 else 16
    while size[0] % patch or size[1] % patch:
        patch //= 2
    return patch


def _check_patch(patch: int, size: tuple[int, int]) -> None:
    divisors = [d for d in range(1, min(size) + 1) if size[0] % d == 0 and size[1] % d == 0]
    valid = f"a divisor of the image's sides {size[0]}x{size[1]}: {', '.join(map(str, divisors))}"
    require("patch_size", patch, patch in divisors, valid)


def _own_patch(arch: str) -> int:
    """Side of the patches of one of timm's vision transformers; half a second, most of it imports."""
    import torch
    from timm.models import create_model

    one_block: dict[str, Any] = {"depth": 1}
    with torch.device("meta"):
        net: Any = create_model(arch, num_classes=0, **one_block)
    return net.patch_embed.patch_size[0]


def _load(net: VisionTransformer, path: str, channels: int) -> None:
    """Load the .safetensors file at `path`, fitted to the sizes, the input channels and the depth of `net`."""
    from timm.models import adapt_input_conv
    from timm.models.vision_transformer import checkpoint_filter_fn

    state = _weights.read(path)
    stem = "patch_embed.proj.weight"
    if stem in state and state[stem].dim() == 4 and state[stem].shape[1] == 3:
        state[stem] = adapt_input_conv(channels, state[stem])
    state = checkpoint_filter_fn(state, net, adapt_layer_scale=True)
    count = len(net.blocks)

    def spare(name: str) -> bool:
        parts = name.split(".")
        return parts[0] in ("head", "head_dist") or (parts[0] == "blocks" and int(parts[1]) >= count)

    _weights.fit(net, state, path, spare)
