"""Small configurations of any family in transformers, by what families call what makes them small."""

import inspect

from transformers import CONFIG_MAPPING

END = 2
# What makes a model small, by the names that families give it; each gets those it knows.
SMALL = {
    **dict.fromkeys(
        ("hidden_size", "n_embd", "d_model", "dim", "embedding_size", "emb_dim", "word_embed_proj_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_decoder_layers", "num_encoder_layers", "num_blocks"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    **dict.fromkeys(("decoder_attention_heads", "num_encoder_attention_heads", "num_decoder_attention_heads"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "dff", "encoder_ffn_dim", "decoder_ffn_dim"), 48),
    **dict.fromkeys(("n_inner", "dim_ff"), 48),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "v_head_dim", "d_kv", "head_dim"), 8),
    **dict.fromkeys(("qk_rope_head_dim", "qk_nope_head_dim", "state_size"), 4),
    **{"vocab_size": 300, "num_key_value_heads": 2, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": END, "decoder_start_token_id": 0, "is_decoder": True},
}
_NO_WIDTH = {"head_dim": None, "qk_head_dim": None}  # None: left to the family
_ROPE = {"head_dim": 4}
_LATENT = {**_ROPE, "index_topk": 32, "index_head_dim": 8, "index_n_heads": 2, "num_key_value_heads": 4, "n_group": 1,
           "topk_group": 1, "first_k_dense_replace": 1}  # fmt: skip
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_chunk_size": 8}
_WAYS = {"layer_types": ["linear_attention", "full_attention"]}
ALSO = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "minicpm3", "youtu"), _NO_WIDTH),
    **dict.fromkeys(("axk1", "axk2", "deepseek_v32", "glm_moe_dsa"), _LATENT),
    **dict.fromkeys(("bamba", "granitemoehybrid", "falcon_h1"), _MAMBA),
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text", "olmo_hybrid", "kimi_linear"), _WAYS),
    "axk1": {**_LATENT, "mlp_layer_types": ["dense", "sparse"]},
    "cohere_compass_text": {"layer_types": ["full_attention", "full_attention"]},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4},
    "dots3_note_text": {"num_key_value_heads": 4},
    "gemma3n_text": {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8},
    "gemma4_text": {"vocab_size_per_layer_input": 300, "hidden_size_per_layer_input": 8, "global_head_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "kimi_linear": {**_WAYS, "head_dim": 4, "num_key_value_heads": 4, "linear_head_dim": 8, "linear_num_heads": 4},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longcat_flash": {**_ROPE, "num_key_value_heads": 4, "ffn_hidden_size": 48, "expert_ffn_hidden_size": 16,
                      "moe_topk": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8},
    "marian": {"decoder_vocab_size": 300},
    "plbart": {"num_attention_heads": None},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "local_attn_chunk_length": 4},
    "switch_transformers": {"num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1, "decoder_sparse_step": 1},
    "t5": {"decoder_start_token_id": 0},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def config_of(family, **more):
    cls = CONFIG_MAPPING[family]
    known = {*inspect.signature(cls.__init__).parameters, *getattr(cls, "__annotations__", {}), *cls.attribute_map}
    own = ALSO.get(family, {})
    given = {k: v for k, v in {**SMALL, **own}.items() if (k in known or k in own) and v is not None}
    return cls(**{**given, **more})
