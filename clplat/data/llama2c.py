"""Llama models in the layout of llama2.c (karpathy/llama2.c): configuration, weights and tokenizer for transformers.

The file names tensors as Meta's Llama does, and rotates adjacent pairs of a head where transformers rotates halves, so
the rows of the query and key projections are put in another order here.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import Tensor

_NAMES = {
    "attention.wq": "self_attn.q_proj",
    "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w2": "mlp.down_proj",
    "feed_forward.w3": "mlp.up_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
_KEYS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


def is_ours(config: dict[str, Any]) -> bool:
    """Whether a folder's config.json is in this layout."""
    return "model_type" not in config and all(key in config for key in _KEYS)


def to_config(config: dict[str, Any]) -> Any:
    """transformers' LlamaConfig."""
    from transformers import LlamaConfig

    make: Any = LlamaConfig
    return make(
        vocab_size=config["vocab_size"],
        hidden_size=config["dim"],
        intermediate_size=config["hidden_dim"],
        num_hidden_layers=config["n_layers"],
        num_attention_heads=config["n_heads"],
        num_key_value_heads=config["n_kv_heads"],
        max_position_embeddings=config["max_seq_len"],
        rms_norm_eps=config.get("rms_norm_eps", 1e-5),
        rope_theta=config.get("rope_theta", 10000.0),
        bos_token_id=config.get("bos_token_id", 1),
        eos_token_id=config.get("eos_token_id", 2),
        tie_word_embeddings=config.get("tie_word_embeddings", True),
    )


def to_state(state: dict[str, Tensor], config: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors under transformers' names, rows of queries and keys in its order."""
    found = {}
    for name, tensor in state.items():
        stem, _, kind = name.rpartition(".")
        if name.startswith("layers."):
            _, number, part = stem.split(".", 2)
            heads = {"attention.wq": config["n_heads"], "attention.wk": config["n_kv_heads"]}.get(part)
            found[f"model.layers.{number}.{_NAMES.get(part, part)}.{kind}"] = (
                tensor if heads is None else _halves(tensor, heads)
            )
        elif stem == "tok_embeddings":
            found["model.embed_tokens.weight"] = tensor
            found.setdefault("lm_head.weight", tensor)
        else:
            found["lm_head.weight" if stem == "output" else f"model.{name}"] = tensor
    return found


def _halves(weight: Tensor, heads: int) -> Tensor:
    """Rows (heads · d, D) of interleaved pairs to halves: the even rows of each head first, then the odd ones."""
    rows, width = weight.shape
    return weight.view(heads, rows // heads // 2, 2, width).transpose(1, 2).reshape(rows, width)


def tokenizer(file: Path) -> Any:
    """The BPE of a `tok*.json` file: {"pieces": [[bytes as hex, merge score], ...]}, the first three for unknown,
    begin and end, the next 256 for single bytes. Two pieces that make a third are merged, best score first."""
    from tokenizers import Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    pieces = json.loads(file.read_text(encoding="utf-8"))["pieces"]
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words += [bytes.fromhex(piece).decode("utf-8").replace(" ", "▁") for piece, _ in pieces[len(words) :]]
    known = {word: number for number, word in enumerate(words)}
    ranked = sorted(range(259, len(words)), key=lambda number: -pieces[number][1])
    pairs = [
        (words[n][:cut], words[n][cut:])
        for n in ranked
        for cut in range(1, len(words[n]))
        if words[n][:cut] in known and words[n][cut:] in known
    ]
    made = Tokenizer(BPE(vocab=known, merges=pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return made
