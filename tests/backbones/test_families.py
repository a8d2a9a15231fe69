"""Every family of language models in transformers: scores and greedy answers are those of plain passes, or refused."""

import pytest
import torch
import transformers
from small_configs import END, config_of
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

from clplat.backbones.language_model import language_model
from clplat.errors import UserError
from clplat.stream import Answers

ANSWERS = torch.tensor([[10, 11, END], [12, END, -1], [13, 14, END], [15, 16, END]])  # (K, A)
PROMPTS = torch.where(torch.arange(12) < torch.tensor([[5], [12], [9]]), torch.arange(20, 56).view(3, 12), -1)  # (B, L)

IMAGES = "has a part for images, speech or bytes that does not get small by these names; its text part is a family too"
NOT_SMALL = {
    **dict.fromkeys(("blt", "dots3_note", "fuyu", "gemma3", "gemma3n", "gemma4", "gemma4_unified", "git"), IMAGES),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant", "got_ocr2", "llama4", "mllama"), IMAGES),
    **dict.fromkeys(("moss_transcribe_diarize", "musicgen", "musicgen_melody", "phi4_multimodal"), IMAGES),
    **dict.fromkeys(("qwen3_5", "qwen3_5_moe", "qwen4_exp", "emu3", "audioflamingo3", "glmasr"), IMAGES),
    **dict.fromkeys(("granite_speech", "granite_speech_plus", "musicflamingo", "nemo_speechlm", "qwen2_audio"), IMAGES),
    **dict.fromkeys(("qwen3_asr", "t5gemma", "t5gemma2", "vibevoice_asr", "voxtral", "voxtral_realtime"), IMAGES),
    "cohere_compass_text": "its rotary positions are only made from a checkpoint's own config.json",
    "dbrx": "its configuration lacks what its own attention asks for",
    "encoder-decoder": "is made of two others",
    "zamba": "shares layers in a pattern of its own length",
    "zamba2": "shares layers in a pattern of its own length",
}
REFUSED = {
    **dict.fromkeys(("cpmant", "xlm", "xlnet"), "reads an answer before it writes it"),
    **dict.fromkeys(("fsmt", "prophetnet"), "depends on the rest of its batch"),
    **dict.fromkeys(("reformer", "xmod"), "can't be run on token ids alone"),
    "whisper": "whisper is no language model of transformers",
}
FAST = ("bloom", "falcon", "gpt2", "gpt_neo", "llama", "mamba", "mpt", "mt5", "bart", "opt", "xlnet")
DECODERS, SEQ2SEQ = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), sorted(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES)


def small(config, tmp_path, std=0.3):
    """The backbone of a configuration, with weights large enough for every token to matter."""
    config.save_pretrained(tmp_path)
    backbone = language_model((2, 12), config=str(tmp_path)).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    return backbone


def plain(backbone, prompt, answer):
    """Log-likelihood of one answer to one prompt, nothing padded."""
    net = backbone.net
    if backbone.seq2seq:
        fed = torch.cat([torch.tensor([backbone._start]), answer[:-1]])
        logits = net(input_ids=prompt[None], decoder_input_ids=fed[None]).logits[0]
    else:
        logits = net(input_ids=torch.cat([prompt, answer])[None], use_cache=False).logits[0, len(prompt) - 1 : -1]
    return float(logits.double().log_softmax(-1).gather(1, answer[:, None]).sum())


def assert_greedy(backbone, prompt, written):
    """Each written token is the best by a plain pass over all before it; nothing padded, nothing cached."""
    net, found = backbone.net, [i for i in written.tolist() if i >= 0]
    for step, token in enumerate([*found, END][: len(written)]):
        before = torch.tensor(found[:step], dtype=torch.int64)
        if backbone.seq2seq:
            fed = torch.cat([torch.tensor([backbone._start]), before])
            logits = net(input_ids=prompt[None], decoder_input_ids=fed[None]).logits[0, -1]
        else:
            logits = net(input_ids=torch.cat([prompt, before])[None], use_cache=False).logits[0, -1]
        assert logits[token] >= logits.max() - 1e-4  # equal logits are rounded either way


@torch.no_grad()
def compare(backbone):
    alone = [[plain(backbone, p[p >= 0], a[a >= 0]) for a in ANSWERS] for p in PROMPTS]
    scores = backbone.answer_scores(PROMPTS, ANSWERS.expand(3, -1, -1)).double()
    torch.testing.assert_close(scores, torch.tensor(alone).double(), atol=1e-4, rtol=1e-5)
    for prompt, written in zip(PROMPTS, backbone.generate(PROMPTS, 3, END), strict=True):
        assert_greedy(backbone, prompt[prompt >= 0], written)
    features = backbone.features(torch.stack([PROMPTS, PROMPTS], 1))
    assert features.shape == (3, backbone.embed_dim)
    assert len(backbone.blocks) >= 1


def _marked(families):
    return [f if f in FAST else pytest.param(f, marks=pytest.mark.slow) for f in families]


@pytest.mark.parametrize("family", _marked(DECODERS))
def test_a_decoder_scores_and_writes_as_by_plain_passes(family, tmp_path):
    if family in NOT_SMALL:
        pytest.skip(f"{family}: {NOT_SMALL[family]}")
    as_decoder = {"is_encoder_decoder": False} if family in SEQ2SEQ else {}
    if family in REFUSED:
        with pytest.raises(UserError, match=REFUSED[family]):
            small(config_of(family, **as_decoder), tmp_path)
    else:
        compare(small(config_of(family, **as_decoder), tmp_path))


@pytest.mark.parametrize("family", _marked(SEQ2SEQ))
def test_an_encoder_decoder_scores_and_writes_as_by_plain_passes(family, tmp_path):
    if family in NOT_SMALL:
        pytest.skip(f"{family}: {NOT_SMALL[family]}")
    if family in REFUSED:
        with pytest.raises(UserError, match=REFUSED[family]):
            small(config_of(family), tmp_path)
    else:
        compare(small(config_of(family), tmp_path))


_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
VARIANTS = {
    "mistral": {"sliding_window": 4},
    "gemma2": {"sliding_window": 4, **_MIXED},
    "gemma3_text": {"sliding_window": 4, **_MIXED},
    "cohere2": {"sliding_window": 4, **_MIXED},
    "qwen2": {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    "phi3": {"sliding_window": 4},
    "gpt_oss": {"sliding_window": 4, **_MIXED},
    "olmo3": {"sliding_window": 4, **_MIXED},
    "falcon": {"alibi": True},
    "granite": {"logits_scaling": 8.0, "residual_multiplier": 0.5},
    "cohere": {"logit_scale": 0.0625},
    "opt": {"word_embed_proj_dim": 16, "do_layer_norm_before": False},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True},
}


@pytest.mark.parametrize("family", VARIANTS)
def test_windows_positions_and_scales_that_a_configuration_may_have(family, tmp_path):
    compare(small(config_of(family, **VARIANTS[family]), tmp_path))


def test_a_window_is_seen_in_the_scores_and_decides_on_the_passes(tmp_path):
    windowed = small(config_of("mistral", sliding_window=4), tmp_path)
    assert [windowed.one_pass(n) for n in (4, 5)] == [True, False]
    whole = small(config_of("mistral", sliding_window=None), tmp_path)
    assert whole.one_pass(10**6)
    answers = ANSWERS.expand(3, -1, -1)
    assert (windowed.answer_scores(PROMPTS, answers) - whole.answer_scores(PROMPTS, answers)).abs().max() > 0.01


def test_an_image_model_is_taken_for_its_text(tmp_path):
    from transformers import Gemma3Config

    sight = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = config_of("gemma3_text", sliding_window=4, **_MIXED).to_dict()
    both = Gemma3Config(text_config=text, vision_config={**sight, "image_size": 32, "patch_size": 16},
                        mm_tokens_per_image=4)  # fmt: skip
    backbone = small(both, tmp_path)
    compare(backbone)
    assert len(backbone.blocks) == 2


@pytest.mark.parametrize("family", ["bert", "roberta"])
def test_an_encoder_is_no_decoder_unless_its_configuration_says_so(family, tmp_path):
    with pytest.raises(UserError, match=rf"this {family} reads an answer .* is_decoder: true"):
        small(config_of(family, is_decoder=False), tmp_path)
    compare(small(config_of(family), tmp_path))


def test_what_weights_say_of_generation_does_not_reach_greedy_answers(tmp_path):
    backbone = small(config_of("bart"), tmp_path)
    plainly = backbone.generate(PROMPTS, 4, END)
    brought = transformers.GenerationConfig(num_beams=3, forced_eos_token_id=END, min_length=3, repetition_penalty=9.0)
    backbone.net.generation_config = brought
    assert torch.equal(backbone.generate(PROMPTS, 4, END), plainly)
    assert backbone.net.generation_config is brought


def test_lengths_that_a_batch_would_change_are_refused(tmp_path):
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "rope_theta": 1e4,
            "original_max_position_embeddings": 13}  # fmt: skip
    backbone = small(config_of("phi3", rope_parameters=rope, original_max_position_embeddings=13), tmp_path)
    told = Answers(ANSWERS, END, 300)
    with pytest.raises(
        UserError, match=r"stream\.max_length: prompts of 12 .* answers of 3 .* batch of 13 \(valid: ≤ 10"
    ):
        backbone.assemble(None, told)
    with pytest.raises(UserError, match=r"stream\.max_length: prompts of 12 .* context of 8 \(valid: ≤ 8"):
        small(config_of("bart", max_position_embeddings=8), tmp_path).assemble(None, told)
