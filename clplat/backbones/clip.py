"""CLIP: an image tower and a text tower of transformers, whose classes are named in words.

Source   Radford et al., "Learning Transferable Visual Models From Natural Language Supervision", ICML 2021,
         arXiv:2103.00020.
    logits = exp(s) · f(x)ᵀ g(w_c)        f(x), g(w_c) of length 1: the image's and the class prompt's features
Differs  s is frozen, as all continual protocols have it.

Shapes: B images, C classes, T tokens of the longest prompt, P patches, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clplat.backbones import _weights
from clplat.backbones.answering import ImageText
from clplat.backbones.base import Backbone, Head, Role, at_least_one, image_shape, require
from clplat.data.tokens import HUB_FILES, find_folder, read_json
from clplat.errors import UserError
from clplat.stream import Actions, Answers

FILES = (*HUB_FILES, "*.safetensors", "*.safetensors.index.json")


class CLIP(Backbone):
    """Both towers of a CLIP. Features are the image's; the blocks are the image tower's, then the text tower's.

    Args:
        net: transformers' CLIPModel.
        resize: side in pixels that images are resized to first, bilinearly; None where they come in the right size.
    """

    needs_head = False
    shardable = True

    def __init__(self, net: Any, resize: int | None = None) -> None:
        super().__init__()
        self.net, self.resize = net, resize
        self.embed_dim: int = net.config.projection_dim
        self.vocabulary: int = net.config.text_config.vocab_size
        self.context: int = net.config.text_config.max_position_embeddings
        self._prompts: Tensor | None = None  # (C, T) bool: which positions of the last prompts hold tokens
        net.logit_scale.requires_grad_(False)

    @property
    def blocks(self) -> list[nn.Module]:
        return [block for tower in self.stacks for block in tower]

    @property
    def stacks(self) -> list[list[nn.Module]]:
        return [[*self.net.vision_model.encoder.layers], [*self.net.text_model.encoder.layers]]

    def positions(self) -> Sequence[Tensor | None] | None:
        """No padding in the image tower."""
        images, prompts = self.net.vision_model.encoder.layers, self.net.text_model.encoder.layers
        return [*[None] * len(images), *[self._prompts] * len(prompts)]

    def role(self, name: str) -> Role | None:
        inside = name.partition("encoder.layers.")[2]
        if "self_attn" in inside:
            return "attention"
        return "ffn" if "mlp" in inside else None

    def alike(self, name: str) -> bool:
        """The text tower's: the prompts of the classes that compete."""
        return name.startswith("net.text_model.")

    def assemble(self, head: Head | None, answers: Answers | Actions | None) -> ImageText:
        if isinstance(answers, Actions):
            raise UserError("backbone: clip answers in words, but this stream asks for actions (valid: actor_critic)")
        if answers is not None:
            if not len(answers.classes):
                raise UserError(
                    "backbone: clip needs classes named in words (valid: a stream that names them, as clip)"
                )
            if answers.vocabulary > self.vocabulary:
                raise UserError(
                    f"stream.tokenizer: gives {answers.vocabulary} ids, but the model knows {self.vocabulary} (valid: "
                    f"the model's own, or for weights random backbone.vocabulary ≥ {answers.vocabulary})"
                )
            if answers.classes.shape[1] > self.context:
                raise UserError(
                    f"stream.tokenizer: prompts of {answers.classes.shape[1]} tokens do not fit into the model's "
                    f"context of {self.context} (valid: the model's own tokenizer)"
                )
        return ImageText(self, answers)

    @at_least_one
    def features(self, inputs: Tensor) -> Tensor:
        """Features (B, D) of length 1 of images (B, 3, H, W)."""
        if self.resize is not None:
            inputs = F.interpolate(inputs, self.resize, mode="bilinear", align_corners=False, antialias=True)
        pooled = self.net.vision_model(pixel_values=inputs).pooler_output
        return F.normalize(self.net.visual_projection(pooled), dim=-1)

    def text_features(self, tokens: Tensor) -> Tensor:
        """Features (C, D) of length 1 of prompts (C, T), which end with their end token and are filled with -1."""
        self._prompts = real = tokens >= 0
        hidden = self.net.text_model(input_ids=tokens.clamp(min=0), attention_mask=real.long()).last_hidden_state
        rows = torch.arange(len(tokens), device=tokens.device)
        return F.normalize(self.net.text_projection(hidden[rows, real.sum(1) - 1]), dim=-1)

    def scale(self) -> Tensor:
        """exp(s), a scalar."""
        return self.net.logit_scale.exp()


def clip(
    input_shape: tuple[int, ...],
    weights: str = "random",
    config: str | None = None,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    patch_size: int = 8,
    vocabulary: int = 512,
) -> Backbone:
    """CLIP of transformers, both towers; or a small one from nothing.

    Args:
        input_shape: (3, height, width), height = width.
        weights: "random"; or a folder with config.json and .safetensors files, as transformers lays it out, a name
            below weights/ of the data root, or a name on the hub (its cache first), as openai/clip-vit-base-patch16.
        config: folder or hub name whose config.json gives the structure of random weights; null: the five below.
        dim: features of both towers, > 0 and a multiple of `heads`.
        depth: number of blocks of each tower, > 0.
        heads: of attention, > 0.
        patch_size: side of a patch in pixels, a divisor of the image's.
        vocabulary: token ids of the text tower, > 0.

    Raises:
        UserError: options out of range, no CLIP, weights that are damaged or do not fit.
        MissingError: the weights are neither here nor reachable; says which file to put where.
    """
    channels, height, width = image_shape(input_shape, "clip")
    if channels != 3 or height != width:
        raise UserError(
            f"backbone: clip takes square colour images (3, side, side), but the stream's are {input_shape}"
        )
    if weights != "random":
        from transformers import CLIPModel

        folder = find_folder(weights, "backbone.weights", FILES)
        net = _weights.read_folder(CLIPModel, folder, _config(folder), torch.float32)
    elif config is not None:
        net = _model(_config(find_folder(config, "backbone.config", FILES)))
    else:
        require("heads", heads, heads > 0, "> 0")
        require("dim", dim, dim > 0 and dim % heads == 0, f"> 0 and a multiple of heads = {heads}")
        require("depth", depth, depth > 0, "> 0")
        divides = patch_size > 0 and height % patch_size == 0
        require("patch_size", patch_size, divides, f"a divisor of the image's side {height}")
        require("vocabulary", vocabulary, vocabulary > 0, "> 0")
        net = _model(_small(height, dim, depth, heads, patch_size, vocabulary))
    side = net.config.vision_config.image_size
    return CLIP(net, None if side == height else side)


def _small(side: int, dim: int, depth: int, heads: int, patch_size: int, vocabulary: int) -> Any:
    from transformers import CLIPConfig

    tower = {
        "hidden_size": dim,
        "intermediate_size": 4 * dim,
        "num_hidden_layers": depth,
        "num_attention_heads": heads,
    }
    text = {"vocab_size": vocabulary, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2}
    return CLIPConfig(
        text_config={**tower, **text},
        vision_config={**tower, "image_size": side, "patch_size": patch_size},
        projection_dim=dim,
    )


def _config(folder: Path) -> Any:
    if not (folder / "config.json").is_file() and (folder / "open_clip_config.json").is_file():
        raise UserError(
            f"backbone.weights: {folder} is in the layout of open_clip, which is not read (valid: that of "
            "transformers, as laion/CLIP-ViT-B-32-laion2B-s34B-b79K has beside it, with config.json)"
        )
    if read_json(folder / "config.json").get("model_type") != "clip":
        raise UserError(f"backbone.weights: {folder} holds no CLIP (valid: a config.json of model_type clip)")
    from transformers import CLIPConfig

    return CLIPConfig.from_pretrained(folder, local_files_only=True)


def _model(config: Any) -> Any:
    from transformers import CLIPModel

    return CLIPModel(config)
