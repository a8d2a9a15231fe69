"""Encoders of texts: features by plain passes of transformers, whatever else is in the batch; folders and faults."""

import json
import os
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from small_configs import config_of

from clplat.backbones import _families
from clplat.backbones.heads import Growing, Linear
from clplat.backbones.text_encoder import TextEncoder, text_encoder
from clplat.errors import MissingError, UserError
from clplat.stream import Answers, Experience, Kind

TEXTS = torch.where(torch.arange(12) < torch.tensor([[5], [12], [9]]), torch.arange(20, 56).view(3, 12), -1)  # (B, L)
INPUTS = torch.stack([TEXTS, torch.full_like(TEXTS, -1)], 1).int()
# Families and position schemes: absolute; behind that of padding; relative in three ways; none but rotary; windows.
VARIANTS = {
    "albert": {},
    "bert": {},
    "deberta": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "max_relative_positions": 8},
    "deberta-v2": {"relative_attention": True, "pos_att_type": ["c2p", "p2c"], "position_biased_input": False,
                   "share_att_key": True, "position_buckets": 4, "max_relative_positions": 16, "conv_kernel_size": 3},
    "distilbert": {},
    "electra": {},
    "eurobert": {},
    "longformer": {"attention_window": 8},
    "luke": {},
    "modernbert": {"local_attention": 4, "global_attn_every_n_layers": 2},
    "mpnet": {},
    "nomic_bert": {},
    "roberta": {},
    "roformer": {},
    "xlm-roberta": {},
}  # fmt: skip
REFUSED = {
    "canine": "can't be run as an encoder of token ids",
    "convbert": "depends on the padding behind it",
    "flaubert": "stand in no single list of blocks",
    "fnet": "depends on the padding behind it",
    "gpt2": "does not see those behind it",
    "llama": "does not see those behind it",
    "nystromformer": "depends on the padding behind it",
    "squeezebert": "put out no states for 6 tokens",
    "t5": "stand in no single list of blocks",
    "xlnet": r"states of shape \(6, 1\) for 6 tokens",
}


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def build(family, length=12, pooling="mean", **more):
    """An encoder with weights large enough for every token to matter."""
    backbone = TextEncoder(
        transformers.AutoModel.from_config(config_of(family, is_decoder=False, **more)), length, pooling
    ).eval()
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.3)
    return backbone


def plain(net, text, pooling="mean"):
    """Features (D,) of one text, nothing padded."""
    states = net(input_ids=text[None].long()).last_hidden_state[0]
    return states[0] if pooling == "cls" else states.mean(0)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
@pytest.mark.parametrize("family", VARIANTS)
def test_features_are_those_of_a_text_alone(family, pooling):
    backbone = build(family, pooling=pooling, **VARIANTS[family])
    with torch.no_grad():
        alone = torch.stack([plain(backbone.net, text[text >= 0], pooling) for text in TEXTS])
        torch.testing.assert_close(backbone(INPUTS), alone, atol=1e-4, rtol=1e-4)
        wide = torch.nn.functional.pad(INPUTS, (0, 9), value=-1)
        torch.testing.assert_close(backbone(wide), alone, atol=1e-4, rtol=1e-4)
    assert backbone(INPUTS).shape == (3, backbone.embed_dim)


@pytest.mark.parametrize("family", VARIANTS)
def test_blocks_layers_and_what_learns(family):
    backbone = build(family, **VARIANTS[family])
    assert len(backbone.blocks) == (1 if family == "albert" else 2)  # one that is run twice
    attention, ffn = backbone.layers("attention"), backbone.layers("ffn")
    kinds = {backbone.projection(name) for name in attention}
    assert kinds >= {"query", "key", "value", "output"} or kinds >= {"qkv", "output"}
    assert None not in kinds
    assert len(ffn) in {k * len(backbone.blocks) for k in (2, 3)}
    with backbone.recorded() as states:
        (backbone(INPUTS) @ torch.linspace(-1, 1, backbone.embed_dim)).sum().backward()
    padded = 16 if family == "longformer" else 12
    assert [tuple(h.shape[:2]) for h in states.outputs] == [(3, padded)] * len(backbone.blocks)
    assert all(torch.equal(v, torch.nn.functional.pad(TEXTS >= 0, (0, padded - 12))) for v in states.valid)
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
    held = {id(p) for p in backbone.parameters() if not p.requires_grad}
    assert not any(id(layer.weight) in held for layer in (*attention.values(), *ffn.values()))


@pytest.mark.parametrize("family", REFUSED)
def test_what_is_no_encoder_or_depends_on_its_batch_is_refused(family):
    with pytest.raises(UserError, match=rf"backbone\.weights: .*{REFUSED[family]}") as caught:
        build(family)
    assert len(caught.value.faults) == 1


def test_the_context_counts_from_behind_padding_and_bigbird_stays_in_its_plain_attention():
    assert _families.context(build("bert").net) == 128
    assert _families.context(build("roberta", pad_token_id=1).net) == 126
    blocks = {"attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1}
    assert _families.context(build("big_bird", **blocks).net) == 14
    longest = build("roberta", length=126, pad_token_id=1)
    full = torch.randint(5, 300, (1, 1, 126)).expand(1, 2, 126)
    assert longest(full).isfinite().all()
    head = Growing(32, 4)
    assert longest.assemble(head, None).backbone is longest
    with pytest.raises(UserError, match=r"stream\.max_length: texts of 127 .* context of 126 \(valid: ≤ 126\)"):
        build("roberta", length=127, pad_token_id=1).assemble(head, None)


def small(**options):
    return text_encoder((2, 12), **{"dim": 16, "heads": 2, "vocabulary": 60, **options})


def test_a_head_gives_logits_and_grows():
    model = small().assemble(Growing(16, 4), Answers(torch.empty(0, 0), 2, 60)).eval()
    model.grow(Experience(0, "e", Kind.LEARN, None, classes=(0, 1)))
    assert model(INPUTS).shape == (3, 2)
    torch.testing.assert_close(model(INPUTS), model.head(model.features(INPUTS)))
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(model(INPUTS[order]), model(INPUTS)[order])
    torch.testing.assert_close(model(INPUTS[:1]), model(INPUTS)[:1])


def saved(folder, family="bert", **more):
    net = transformers.AutoModel.from_config(config_of(family, is_decoder=False, **more))
    net.save_pretrained(folder)
    return net.eval()


def test_a_folder_is_read_and_its_pooler_may_be_missing(tmp_path):
    net = saved(tmp_path)
    backbone = text_encoder((2, 12), weights=str(tmp_path)).eval()
    assert backbone.pooling == "mean"
    torch.testing.assert_close(backbone(INPUTS)[0], plain(net, TEXTS[0][:5]))
    state = load_file(tmp_path / "model.safetensors")
    kept = {k: v for k, v in state.items() if "pooler" not in k}
    assert len(kept) < len(state)
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    torch.testing.assert_close(text_encoder((2, 12), weights=str(tmp_path)).eval()(INPUTS), backbone(INPUTS))
    kept.pop(next(k for k in kept if k.endswith("key.weight")))
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit: lacks .*key\.weight \(of 1 tensors\)"):
        text_encoder((2, 12), weights=str(tmp_path))


def test_a_head_that_weights_were_trained_with_is_left_out(tmp_path):
    net = transformers.AutoModelForMaskedLM.from_config(config_of("bert", is_decoder=False))
    net.save_pretrained(tmp_path)
    backbone = text_encoder((2, 12), weights=str(tmp_path)).eval()
    torch.testing.assert_close(backbone(INPUTS)[0], plain(net.eval().bert, TEXTS[0][:5]))


def test_a_folder_of_sentence_transformers_says_how_it_pools(tmp_path):
    saved(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    told = tmp_path / "1_Pooling" / "config.json"
    for key, pooling in (("pooling_mode_cls_token", "cls"), ("pooling_mode_mean_tokens", "mean")):
        told.write_text(json.dumps({"word_embedding_dimension": 32, key: True, "pooling_mode_max_tokens": False}))
        assert text_encoder((2, 12), weights=str(tmp_path)).pooling == pooling
    told.write_text(json.dumps({"pooling_mode_max_tokens": True}))
    with pytest.raises(UserError, match=r"backbone\.pooling: null, .* says pooling_mode_max_tokens \(valid: mean or"):
        text_encoder((2, 12), weights=str(tmp_path))
    assert text_encoder((2, 12), weights=str(tmp_path), pooling="cls").pooling == "cls"


def test_files_that_are_missing_are_named(tmp_path):
    with pytest.raises(MissingError, match=r"config\.json is missing: put it there"):
        text_encoder((2, 12), weights=str(tmp_path))
    config_of("bert", is_decoder=False).save_pretrained(tmp_path)
    with pytest.raises(MissingError, match=r"put model\.safetensors there"):
        text_encoder((2, 12), weights=str(tmp_path))
    with pytest.raises(MissingError, match=r"no folder .*absent"):
        text_encoder((2, 12), weights=str(tmp_path / "absent" / "too"))


def test_faults_are_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match=r"text_encoder takes text \(2, tokens\)"):
        text_encoder((3, 16, 16))
    for key, value in (("heads", 0), ("dim", 15), ("depth", 0), ("vocabulary", 0), ("pooling", "max")):
        with pytest.raises(UserError, match=rf"backbone\.{key}: "):
            small(**{key: value})
    with pytest.raises(UserError, match=r"stream\.tokenizer: gives 61 ids, but the model knows 60"):
        small().assemble(Growing(16, 4), Answers(torch.empty(0, 0), 2, 61))
    with pytest.raises(UserError, match=r"stream\.evaluate: generate"):
        small().assemble(Growing(16, 4), Answers(torch.empty(0, 0), 2, 60, 8))
    transformers.T5Config().save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a t5 is no encoder"):
        text_encoder((2, 12), config=str(tmp_path))


MINILM = Path(os.environ.get("CLPLAT_DATA", "."), "weights", "minilm_l6")


@pytest.mark.skipif(not (MINILM / "config.json").is_file(), reason="no weights/minilm_l6 at hand")
def test_logits_of_minilm_are_those_of_transformers():
    """On real texts of other lengths in one batch, padded as transformers pads them."""
    texts = ["Stocks fell on Monday.", "The home side won by two goals to one after extra time, to the joy of many.",
             "Researchers found water on a distant planet, which orbits a small red star.", "Oil."]  # fmt: skip
    tokenizer = transformers.AutoTokenizer.from_pretrained(MINILM)
    given = tokenizer(texts, padding=True, return_tensors="pt")
    net = transformers.AutoModel.from_pretrained(MINILM).eval()
    ids = given["input_ids"].masked_fill(given["attention_mask"] == 0, -1)
    backbone = text_encoder((2, 64), weights=str(MINILM))
    model = backbone.assemble(Linear(384, 5), Answers(torch.empty(0, 0), 102, len(tokenizer))).eval()
    with torch.no_grad():
        states, mask = net(**given).last_hidden_state, given["attention_mask"][:, :, None]
        expected = model.head((states * mask).sum(1) / mask.sum(1))
        wide = torch.nn.functional.pad(ids, (0, 64 - ids.shape[1]), value=-1)
        found = model(torch.stack([wide, torch.full_like(wide, -1)], 1).int())
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        one = torch.stack([model(torch.stack([row, row])[None].int())[0] for row in ids])
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=0)
    assert [len(backbone.layers(role)) for role in ("attention", "ffn")] == [24, 12]
