"""Encoders of transformers (BERT, RoBERTa, DeBERTa, MiniLM, ModernBERT, ...): texts to features for a head.

Source   Devlin et al., "BERT", NAACL 2019, arXiv:1810.04805 (the small one is a BERT); pooling: Reimers and Gurevych,
         "Sentence-BERT", EMNLP 2019, arXiv:1908.10084.
    mean: f = Σ_t m_t h_t / Σ_t m_t     cls: f = h_1        h_t the last layer's states, m_t 1 for tokens, 0 for padding
Differs  no layer of the original's own follows: neither BERT's pooler (a layer and a tanh) nor the normalisation to
         length 1 that some folders of sentence-transformers name.

Texts come as (B, 2, L) integers filled with -1 at the end (see `streams/text.py`): row 0 token ids; row 1 is not read.
Padding is masked, so that a text's features do not depend on its batch; a model of which that is not true is refused.

Shapes: B samples of a batch, L tokens of the longest text, D features.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from clplat.backbones import _families, _weights
from clplat.backbones.answering import trimmed
from clplat.backbones.base import Backbone, Classifier, Head, Role, at_least_one, require
from clplat.data.tokens import HUB_FILES, find_folder, read_json
from clplat.errors import UserError
from clplat.stream import Actions, Answers

POOLING = "1_Pooling/config.json"  # of a folder of sentence-transformers
FILES = (*HUB_FILES, "*.safetensors", "*.safetensors.index.json", POOLING)


class TextEncoder(Backbone):
    """An encoder of transformers without what it was trained to predict with.

    Args:
        net: as transformers makes it; what pools its states is taken away, and what they do not depend on frozen.
        length: L of the stream, tokens of its longest text.
        pooling: mean over the tokens, or the state of the first one.

    Raises:
        UserError: no encoder, or one whose states depend on padding.
    """

    reads_tokens = True
    shardable = True
    narrowable = True

    def __init__(self, net: Any, length: int, pooling: Literal["mean", "cls"] = "mean") -> None:
        super().__init__()
        require("pooling", pooling, pooling in ("mean", "cls"), "mean or cls")
        if getattr(net, "pooler", None) is not None:
            net.pooler = nn.Identity()
        idle = _families.check_encoder(net)
        for name in idle:
            net.get_parameter(name).requires_grad_(False)
        self._idle = frozenset(f"net.{name.rpartition('.')[0]}" for name in idle)
        self.net, self.length, self.pooling = net, length, pooling
        self.embed_dim: int = net.config.hidden_size
        self.vocabulary: int = net.config.vocab_size
        self.computes_in = net.dtype if net.dtype == torch.bfloat16 else None
        self._width, self._fill = _families.width(net.config), net.config.pad_token_id or 0
        inside = {id(block) for block in self.blocks}
        self._stems = tuple(f"{name}." for name, module in self.named_modules() if id(module) in inside)
        self._real: Tensor | None = None  # (B, L) bool: which positions of the running pass hold tokens

    @property
    def blocks(self) -> list[nn.Module]:
        return _families.encoder_blocks(self.net)

    def role(self, name: str) -> Role | None:
        return None if name in self._idle else _families.role(name, self._stems)

    def positions(self) -> Sequence[Tensor | None] | None:
        return [self._real] * len(self.blocks)

    def assemble(self, head: Head | None, answers: Answers | Actions | None) -> Classifier:
        if isinstance(answers, Answers):
            if answers.new_tokens:
                raise UserError("stream.evaluate: generate, but text_encoder writes no text (valid: score)")
            if answers.vocabulary > self.vocabulary:
                raise UserError(
                    f"stream.tokenizer: gives {answers.vocabulary} ids, but the model knows {self.vocabulary} (valid: "
                    f"the model's own, or for weights random backbone.vocabulary ≥ {answers.vocabulary})"
                )
        if self.length > (context := _families.context(self.net)):
            raise UserError(
                f"stream.max_length: texts of {self.length} tokens do not fit into the model's context of {context} "
                f"(valid: ≤ {context})"
            )
        return super().assemble(head, answers)

    @at_least_one
    def features(self, inputs: Tensor) -> Tensor:
        """Features (B, D) of texts (B, 2, L)."""
        ids = trimmed(inputs[:, 0])  # (B, l)
        ids = nn.functional.pad(ids, (0, -ids.shape[1] % self._width), value=-1)
        self._real = real = ids >= 0
        try:
            found = self.net(input_ids=ids.where(real, self._fill), attention_mask=real.long())
        finally:
            self._real = None  # it is asked for within the pass, and is nothing to keep
        states = found.last_hidden_state  # (B, l, D)
        if self.pooling == "cls":
            return states[:, 0]
        return (states * real.unsqueeze(2)).sum(1) / real.sum(1, keepdim=True).clamp(min=1)


def text_encoder(
    input_shape: tuple[int, ...],
    weights: str = "random",
    config: str | None = None,
    pooling: Literal["mean", "cls"] | None = None,
    dim: int = 64,
    depth: int = 2,
    heads: int = 4,
    vocabulary: int = 512,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> Backbone:
    """Any encoder of transformers, for texts with classes; or a small BERT from nothing.

    Args:
        input_shape: (2, tokens of the longest text), as streams of text have it.
        weights: "random"; or a folder with config.json and .safetensors files, as transformers or sentence-transformers
            lay it out, a name below weights/ of the data root, or a name on the hub (its cache first).
        config: folder or hub name whose config.json gives the structure of random weights; null: the four below.
        pooling: mean over a text's tokens, or cls: the state of its first token, which has to be the tokenizer's mark
            for it; null: as a folder of sentence-transformers says, else mean.
        dim: features of a small BERT (without dropout), > 0 and a multiple of `heads`.
        depth: number of blocks, > 0.
        heads: of attention, > 0.
        vocabulary: token ids, > 0.
        dtype: of the weights; bfloat16 for large frozen ones.

    Raises:
        UserError: options out of range, no encoder, weights that are damaged or do not fit.
        MissingError: the weights are neither here nor reachable; says which file to put where.
    """
    if len(input_shape) != 2 or input_shape[0] != 2:
        raise UserError(f"backbone: text_encoder takes text (2, tokens), but the stream's inputs are {input_shape}")
    length, kind = input_shape[1], getattr(torch, dtype)
    if weights != "random":
        folder = find_folder(weights, "backbone.weights", FILES)
        known = _encoder(_weights.read_config(folder))
        net = _weights.read_folder(_auto(), folder, known, kind, spare=lambda name: "pooler." in name)
        return TextEncoder(net, length, _pooling(folder) if pooling is None else pooling)
    if config is not None:
        known = _encoder(_weights.read_config(find_folder(config, "backbone.config", FILES)))
    else:
        require("heads", heads, heads > 0, "> 0")
        require("dim", dim, dim > 0 and dim % heads == 0, f"> 0 and a multiple of heads = {heads}")
        require("depth", depth, depth > 0, "> 0")
        require("vocabulary", vocabulary, vocabulary > 0, "> 0")
        known = _small(dim, depth, heads, vocabulary, length)
    return TextEncoder(_auto().from_config(known, dtype=kind), length, "mean" if pooling is None else pooling)


def _auto() -> Any:
    from transformers import AutoModel

    return AutoModel


def _small(dim: int, depth: int, heads: int, vocabulary: int, length: int) -> Any:
    from transformers import BertConfig

    return BertConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=4 * dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        max_position_embeddings=max(length, 512),
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )


def _encoder(config: Any) -> Any:
    """A configuration that transformers makes an encoder of; refused where it makes something else, or nothing."""
    from transformers import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING or config.is_encoder_decoder:
        raise UserError(f"backbone.weights: a {config.model_type} is no encoder (valid: bert, roberta, deberta, ...)")
    return config


def _pooling(folder: Path) -> Literal["mean", "cls"]:
    """How a folder of sentence-transformers pools; mean where it is none."""
    if not (folder / POOLING).is_file():
        return "mean"
    content = read_json(folder / POOLING)
    how = sorted(key for key, value in content.items() if key.startswith("pooling_mode_") and value is True)
    known: dict[str, Literal["mean", "cls"]] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "cls",
    }
    if len(how) != 1 or how[0] not in known:
        raise UserError(f"backbone.pooling: null, but {folder / POOLING} says {', '.join(how)} (valid: mean or cls)")
    return known[how[0]]
