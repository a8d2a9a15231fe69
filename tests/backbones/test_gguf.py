"""Language models in GGUF files: the model that was written, its tokenizer, and what is missing."""

from importlib.util import find_spec

import pytest
import torch
import transformers

from clplat.backbones.language_model import language_model
from clplat.data.tokens import load_tokenizer
from clplat.errors import MissingError, UserError

WORDS = ["<unk>", "<s>", "</s>", "▁", "a", "b", "c", "▁a", "▁b", "ab"]
HEADS, KV_HEADS, WIDTH, FFN, LAYERS, LENGTH = 4, 2, 32, 48, 2, 64


def permuted(weight, heads):
    """As llama.cpp has it: the two halves of each head's rotary features in turn."""
    return weight.view(heads, 2, weight.shape[0] // heads // 2, -1).transpose(1, 2).reshape(weight.shape)


def write(file, net):
    """A Llama in 32-bit floats, and a tokenizer by scores, as llama.cpp's converter writes them."""
    gguf = pytest.importorskip("gguf", reason="the package gguf is not here")
    out = gguf.GGUFWriter(file, "llama")
    out.add_context_length(LENGTH)
    out.add_embedding_length(WIDTH)
    out.add_block_count(LAYERS)
    out.add_feed_forward_length(FFN)
    out.add_head_count(HEADS)
    out.add_head_count_kv(KV_HEADS)
    out.add_layer_norm_rms_eps(1e-5)
    out.add_rope_dimension_count(WIDTH // HEADS)
    out.add_vocab_size(len(WORDS))
    out.add_tokenizer_model("llama")
    out.add_token_list(WORDS)
    out.add_token_scores([0.0, 0.0, 0.0, *(-float(i) for i in range(1, len(WORDS) - 2))])
    out.add_token_types([2, 3, 3, *[1] * (len(WORDS) - 3)])
    out.add_unk_token_id(0)
    out.add_bos_token_id(1)
    out.add_eos_token_id(2)
    names = {"embed_tokens": "token_embd", "norm": "output_norm"}
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
             "post_attention_layernorm": "ffn_norm"}  # fmt: skip
    names |= {f"layers.{i}.{a}": f"blk.{i}.{b}" for i in range(LAYERS) for a, b in parts.items()}
    state = {name.removeprefix("model."): value for name, value in net.state_dict().items()}
    for name, short in names.items():
        value = state[f"{name}.weight"]
        heads = HEADS if short.endswith("attn_q") else KV_HEADS if short.endswith("attn_k") else None
        out.add_tensor(f"{short}.weight", (value if heads is None else permuted(value, heads)).numpy())
    out.add_tensor("output.weight", state["lm_head.weight"].numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


@pytest.fixture
def net():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS), hidden_size=WIDTH, intermediate_size=FFN, num_hidden_layers=LAYERS, rms_norm_eps=1e-5,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, max_position_embeddings=LENGTH,
        tie_word_embeddings=False,
    )  # fmt: skip
    net = transformers.LlamaForCausalLM(config).eval()
    for parameter in net.parameters():
        parameter.requires_grad_(False).normal_(std=0.3)
    return net


def test_the_model_is_the_one_that_was_written(net, tmp_path):
    write(tmp_path / "small.gguf", net)
    backbone = language_model((2, 12), weights=str(tmp_path)).eval()
    ids = torch.tensor([[1, 4, 5, 6, 7, 8]])
    torch.testing.assert_close(backbone.net(input_ids=ids).logits, net(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    assert {p.dtype for p in backbone.parameters()} == {torch.float32}
    backbone.net.to(torch.float64)  # spread out, so that it is a model as any other
    (backbone.features(torch.stack([ids, ids], 1))).sum().backward()
    assert len(backbone.layers("attention")) == 4 * LAYERS
    tokenizer = load_tokenizer(str(tmp_path))
    assert tokenizer.end == 2
    assert all(i < len(WORDS) for i in tokenizer.encode(["ab c"])[0])
    assert tokenizer.decode(tokenizer.encode(["ab c"])[0]).strip() == "ab c"


def test_faults_are_told_in_one_line(net, tmp_path, monkeypatch):
    (tmp_path / "a.gguf").write_bytes(b"no such thing")
    if find_spec("gguf") is not None:
        with pytest.raises(UserError, match=r"backbone\.weights: .*a\.gguf is of no known kind \("):
            language_model((2, 12), weights=str(tmp_path))
    monkeypatch.setattr("clplat.data.tokens.find_spec", lambda name: None)
    with pytest.raises(MissingError, match=r"a\.gguf needs the package gguf, which is not here: pip install 'clplat\["):
        language_model((2, 12), weights=str(tmp_path))
    with pytest.raises(MissingError, match=r"stream\.tokenizer: .*a\.gguf needs the package gguf"):
        load_tokenizer(str(tmp_path))
    (tmp_path / "b.gguf").write_bytes(b"")
    with pytest.raises(UserError, match=r"has a\.gguf, b\.gguf \(valid: a folder with one \.gguf file\)"):
        language_model((2, 12), weights=str(tmp_path))
