"""Language models from files: options, formats, layers that can be adapted; against forward passes written here."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from small_language import ANSWERS, END, FAMILIES

from clplat.backbones.language_model import LanguageModel, language_model
from clplat.data.tokens import load_tokenizer
from clplat.errors import MissingError, UserError
from clplat.stream import Answers


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def test_faults_are_told_in_one_line():
    for shape in ((1, 8, 8), (3, 9)):
        with pytest.raises(UserError, match=r"language_model takes text \(2, tokens\)"):
            language_model(shape)
    for key, value in (("heads", 0), ("dim", 30), ("depth", 0), ("vocabulary", 0), ("family", "gru")):
        with pytest.raises(UserError, match=rf"backbone\.{key}: "):
            language_model((2, 9), **{key: value})
    small = language_model((2, 9), vocabulary=30, dim=16, heads=2)
    with pytest.raises(UserError, match=r"stream\.tokenizer: gives 50 ids, but the model knows 30"):
        small.assemble(None, Answers(ANSWERS, END, 50))
    small.net.config.max_position_embeddings = 12
    with pytest.raises(UserError, match=r"stream\.max_length: .* context of 12 \(valid: ≤ 8\)"):
        small.assemble(None, Answers(ANSWERS, END, 30))


def test_missing_and_damaged_weights(tmp_path):
    with pytest.raises(MissingError, match=r"no folder /nowhere/at/all; put the model's files there \(config\.json"):
        language_model((2, 9), weights="/nowhere/at/all")
    with pytest.raises(MissingError, match=r"config\.json is missing: put it there"):
        language_model((2, 9), weights=str(tmp_path))
    net = language_model((2, 9), dim=16, heads=2, vocabulary=50).net
    net.config.save_pretrained(tmp_path)
    with pytest.raises(MissingError, match=r"no \.safetensors file in .*put model\.safetensors there"):
        language_model((2, 9), weights=str(tmp_path))
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickled")  # never read
    with pytest.raises(MissingError, match="safetensors"):
        language_model((2, 9), weights=str(tmp_path))
    net.save_pretrained(tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"backbone\.weights: .* is damaged"):
        language_model((2, 9), weights=str(tmp_path))
    some = {k: v.clone() for k, v in net.state_dict().items() if "layers.1" not in k and k != "lm_head.weight"}
    save_file(some, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit: lacks model\.layers\.1"):
        language_model((2, 9), weights=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "perpetuum"}')
    with pytest.raises(UserError, match=r"config\.json is of no known kind"):
        language_model((2, 9), weights=str(tmp_path))


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_a_folder_and_of_the_data_root(family, tmp_path, monkeypatch):
    first = language_model((2, 9), family=family, dim=16, heads=2, vocabulary=50)
    first.net.save_pretrained(tmp_path / "weights" / "mine")
    again = language_model((2, 9), weights=str(tmp_path / "weights" / "mine"))
    monkeypatch.setenv("CLPLAT_DATA", str(tmp_path))
    named = language_model((2, 9), weights="mine")
    bare = language_model((2, 9), config="mine")
    for key, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key])
        assert torch.equal(tensor, named.state_dict()[key])
    assert any(not torch.equal(t, bare.state_dict()[k]) for k, t in first.state_dict().items())
    assert [b.shape for b in bare.state_dict().values()] == [t.shape for t in first.state_dict().values()]


LAYOUT = {"dim": 8, "hidden_dim": 12, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 20, "max_seq_len": 16}


def _llama2c(folder: Path) -> dict[str, torch.Tensor]:
    """A random model in the layout of llama2.c, written to `folder`."""
    d, h, kv = 8, 12, 4
    shapes = {"tok_embeddings": (20, d), "norm": (d,)}
    for i in range(2):
        own = {"attention_norm": (d,), "ffn_norm": (d,), "attention.wq": (d, d), "attention.wk": (kv, d)}
        own |= {"attention.wv": (kv, d), "attention.wo": (d, d)}
        own |= {"feed_forward.w1": (h, d), "feed_forward.w2": (d, h), "feed_forward.w3": (h, d)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in own.items()}
    state = {f"{name}.weight": torch.randn(shape) for name, shape in shapes.items()}
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(LAYOUT))
    return {name: tensor.double() for name, tensor in state.items()}


def _by_hand(state, ids):
    """Logits (P, V) of ids (P,): Llama as llama2.c computes it, rotating adjacent pairs, in float64."""
    norm = lambda x, w: x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * w  # noqa: E731
    x, count = state["tok_embeddings.weight"][ids], len(ids)
    angle = torch.arange(count)[:, None].double() / 10000.0 ** (torch.arange(0, 2, 2) / 2)  # (P, 1): heads of 2
    turn = torch.polar(torch.ones_like(angle), angle)
    for i in range(2):
        w = {k.removeprefix(f"layers.{i}.").removesuffix(".weight"): v for k, v in state.items() if f"layers.{i}." in k}
        h = norm(x, w["attention_norm"])
        q, k, v = (h @ w[f"attention.w{n}"].T for n in "qkv")
        q, k, v = q.view(count, 4, 2), k.view(count, 2, 2), v.view(count, 2, 2)
        q, k = (torch.view_as_real(torch.view_as_complex(t[..., None, :]) * turn[:, None]).flatten(2) for t in (q, k))
        k, v = k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        score = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(2)
        weight = score.masked_fill(torch.ones(count, count).triu(1).bool(), -torch.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", weight, v).flatten(1) @ w["attention.wo"].T
        h = norm(x, w["ffn_norm"])
        x = x + (F.silu(h @ w["feed_forward.w1"].T) * (h @ w["feed_forward.w3"].T)) @ w["feed_forward.w2"].T
    return norm(x, state["norm.weight"]) @ state["tok_embeddings.weight"].T


def test_llama2c_weights_compute_what_llama2c_computes(tmp_path):
    state, ids = _llama2c(tmp_path), torch.tensor([1, 7, 3, 19, 4, 4])
    net = language_model((2, 9), weights=str(tmp_path)).double().net
    # transformers normalises and rotates in 32 bits whatever the weights are.
    torch.testing.assert_close(net(ids[None]).logits[0], _by_hand(state, ids), atol=1e-5, rtol=1e-4)
    torn = dict(state)
    del torn["norm.weight"]
    save_file(torn, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"does not fit: lacks model\.norm\.weight"):
        language_model((2, 9), weights=str(tmp_path))


ROOT = os.environ.get("CLPLAT_DATA")


@pytest.mark.skipif(not ROOT or not Path(ROOT, "weights/stories260k").is_dir(), reason="no stories260k at hand")
def test_the_small_llama_tells_its_published_story():
    """Greedy sample that karpathy/tinyllamas prints for stories260K."""
    tokenizer = load_tokenizer("stories260k")
    net = language_model((2, 9), weights="stories260k").eval()
    story = tokenizer.decode(net.generate(torch.tensor([tokenizer.before]), 56, tokenizer.end)[0].tolist())
    assert story.startswith(
        "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
        "One day, she saw a big, red ball."
    )


def _gpt2():
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, bos_token_id=1, eos_token_id=END)).eval()


def test_transposed_layers_are_adaptable_and_the_function_is_the_same():
    backbone, theirs = LanguageModel(_gpt2(), 9), _gpt2()
    ids = torch.randint(0, 50, (3, 7))
    torch.testing.assert_close(backbone.net(ids).logits, theirs(ids).logits, atol=1e-5, rtol=1e-5)
    names = {role: list(backbone.layers(role)) for role in ("attention", "ffn")}
    found = {role: [n.removeprefix("net.transformer.h.") for n in names[role]] for role in names}
    assert found["attention"] == [f"{i}.attn.{part}" for i in range(2) for part in ("c_attn", "c_proj")]
    assert found["ffn"] == [f"{i}.mlp.{part}" for i in range(2) for part in ("c_fc", "c_proj")]
    assert [backbone.projection(n) for n in names["attention"][:2]] == ["qkv", "output"]
    for role in found:
        for name, layer in backbone.layers(role).items():
            old = theirs.get_submodule(name.removeprefix("net."))
            assert torch.equal(layer.weight, old.weight.T)
            assert torch.equal(layer.bias, old.bias)


def test_experts_in_one_tensor_are_refused_with_their_name():
    import transformers

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.MixtralConfig(vocab_size=50, num_key_value_heads=2, num_local_experts=2, **shape)
    backbone = LanguageModel(transformers.MixtralForCausalLM(config), 9)
    assert len(backbone.layers("attention")) == 4
    with pytest.raises(UserError, match=r"mlp.experts \(ffn\) is a MixtralExperts, which has no linear"):
        backbone.layers("ffn")


def test_layers_whose_weights_are_read_past_them_are_not_offered():
    """Mamba's fused kernels read all weights of a mixer but its first layer's."""
    import transformers

    config = transformers.MambaConfig(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1)
    backbone = LanguageModel(transformers.MambaForCausalLM(config), 9)
    assert [n.rpartition(".")[2] for n in backbone.layers("ffn")] == ["in_proj"]


def test_a_vector_in_many_dimensions_is_no_layer_of_experts():
    import transformers

    shape = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "attention_hidden_size": 16}
    net = transformers.RwkvForCausalLM(transformers.RwkvConfig(**shape, bos_token_id=1, eos_token_id=END))
    assert len(LanguageModel(net, 9).layers("attention")) == 2 * 4


def test_a_file_of_several_that_is_missing_is_named(tmp_path):
    net = language_model((2, 9), dim=16, heads=2, vocabulary=50).net
    net.save_pretrained(tmp_path, max_shard_size="10KB")
    again = language_model((2, 9), weights=str(tmp_path))
    assert all(torch.equal(t, again.net.state_dict()[k]) for k, t in net.state_dict().items())
    second = sorted(tmp_path.glob("*.safetensors"))[1]
    second.unlink()
    with pytest.raises(MissingError, match=rf"{second.name} is missing, which model\.safetensors\.index\.json names"):
        language_model((2, 9), weights=str(tmp_path))
    (tmp_path / "model.safetensors.index.json").unlink()
    with pytest.raises(MissingError, match=r"model\.safetensors\.index\.json is missing"):
        language_model((2, 9), weights=str(tmp_path))
