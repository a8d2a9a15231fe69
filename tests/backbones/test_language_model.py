"""Language models: scores against a plain loop over transformers, weights against a forward pass written here."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from clplat.backbones.answering import _by_length
from clplat.backbones.language_model import LanguageModel, language_model
from clplat.components.losses import Losses
from clplat.data.tokens import load_tokenizer
from clplat.errors import MissingError, UserError
from clplat.stream import Answers

END = 2
ANSWERS = torch.tensor([[5, 6, 7, END], [5, END, -1, -1], [9, 8, END, -1], [END, -1, -1, -1]])  # (C, A)
PROMPTS = torch.tensor([[1, 20, 21, 22, 23], [1, 30, -1, -1, -1], [1, 40, 41, -1, -1]])  # (B, L)
FAMILIES = ["llama", "t5"]
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}  # transformers takes norms and softmax in float32, whatever the weights


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _inputs(prompts=PROMPTS, length=9, named=None):
    """(B, 2, length), more padding than any prompt needs."""
    x = torch.full((len(prompts), 2, length), -1, dtype=torch.int32)
    x[:, 0, : prompts.shape[1]] = prompts
    if named is not None:
        x[:, 1, : len(named[0])] = torch.tensor(named)
    return x


def _model(family, answers=ANSWERS, new_tokens=0, dtype=torch.float64):
    backbone = language_model((2, 9), family=family, dim=16, depth=2, heads=2, vocabulary=50)
    return backbone.assemble(None, Answers(answers, END, 50, new_tokens)).to(dtype).eval()


def _log_likelihood(net, prompt, answer):
    """Of each token of one answer after one prompt, neither padded: (n,). A call of transformers a pair."""
    if net.config.is_encoder_decoder:
        fed = torch.cat([torch.tensor([0]), answer[:-1]])
        logits = net(input_ids=prompt[None], decoder_input_ids=fed[None]).logits[0]
    else:
        logits = net(input_ids=torch.cat([prompt, answer])[None]).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, answer[:, None])[:, 0]


def _reference(net):
    """(B, C) log-likelihoods, each by itself."""
    rows = [[float(_log_likelihood(net, p[p >= 0], a[a >= 0]).sum().detach()) for a in ANSWERS] for p in PROMPTS]
    return torch.tensor(rows).double()


@pytest.mark.parametrize("family", FAMILIES)
def test_label_scores_are_those_of_each_pair_alone(family):
    model = _model(family)
    torch.testing.assert_close(model(_inputs()).double(), _reference(model.backbone.net), atol=1e-5, rtol=1e-6)
    assert model.predict(_inputs()).shape == (3, 4)


def test_answers_of_one_token_are_scored():
    model = _model("llama", answers=torch.tensor([[5], [9]]))
    expected = torch.stack([model.backbone.net(input_ids=p[p >= 0][None]).logits[0, -1] for p in PROMPTS])
    torch.testing.assert_close(model(_inputs()).double(), expected.log_softmax(-1)[:, [5, 9]], atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_only_the_classes_named_in_a_prompt_are_scored(family):
    model = _model(family)
    everything = model(_inputs())
    some = model(_inputs(named=[[0, 3], [2, -1], [1, 2]]))
    kept = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 1, 0]]).bool()
    assert torch.equal(some.isfinite(), kept)
    torch.testing.assert_close(some[kept], everything[kept])


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_are_the_mean_over_the_answers_own_tokens(family):
    model, labels = _model(family), torch.tensor([0, 3, 2])
    pairs = zip(PROMPTS, ANSWERS[labels], strict=True)
    expected = torch.stack([-_log_likelihood(model.backbone.net, p[p >= 0], a[a >= 0]).mean() for p, a in pairs])
    torch.testing.assert_close(model.losses(_inputs(), labels).double(), expected, **ROUNDING)
    free = F.pad(ANSWERS[labels], (0, 3), value=-1)  # the same as token ids, and more padding
    torch.testing.assert_close(model.losses(_inputs(), free), model.losses(_inputs(), labels), **ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family):
    model, labels = _model(family), torch.tensor([0, 3, 2])
    for call in (model, model.features, lambda x: model.losses(x, labels)):
        torch.testing.assert_close(call(_inputs(length=40)), call(_inputs(length=5)), **ROUNDING)
    for i in range(3):  # and so a sample's neighbours in the batch, which pad it, change nothing
        torch.testing.assert_close(
            model.features(_inputs(PROMPTS[i : i + 1]))[0], model.features(_inputs())[i], **ROUNDING
        )
        torch.testing.assert_close(model(_inputs(PROMPTS[i : i + 1]))[0], model(_inputs())[i], **ROUNDING)


@pytest.mark.parametrize("family", FAMILIES)
def test_batches_cut_by_length_give_the_same_logits(family, monkeypatch):
    model, x = _model(family), _inputs()
    whole = model(x)
    monkeypatch.setattr("clplat.backbones.answering.TOKENS_AT_ONCE", 1)
    assert len(_by_length(x[:, 0], 1, 12)) == 3
    torch.testing.assert_close(model(x), whole, **ROUNDING)
    rows, prompts = zip(*_by_length(x[:, 0], 1, 12), strict=True)
    assert torch.cat(rows).tolist() == [1, 2, 0]  # by length
    assert [p.shape[1] for p in prompts] == [2, 3, 5]


def test_a_part_of_a_batch_holds_no_more_tokens_than_allowed(monkeypatch):
    monkeypatch.setattr("clplat.backbones.answering.TOKENS_AT_ONCE", 100)
    lengths = torch.randint(1, 40, (50,))
    ids = torch.where(torch.arange(40) < lengths[:, None], 7, -1)
    parts = _by_length(ids, 2, 11)
    assert sorted(torch.cat([rows for rows, _ in parts]).tolist()) == list(range(50))
    assert all(len(rows) * (2 * p.shape[1] + 11) <= 100 or len(rows) == 1 for rows, p in parts)
    assert max(len(rows) for rows, _ in parts) > 1


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_the_plain_loop(family):
    model = _model(family, new_tokens=6)
    net, found = model.backbone.net, model.predict(_inputs())
    assert found.shape == (3, 6)
    for prompt, row in zip(PROMPTS, found, strict=True):
        prompt, expected = prompt[prompt >= 0], []
        while len(expected) < 6 and END not in expected:
            if family == "t5":
                fed = torch.tensor([[0, *expected]])
                expected.append(int(net(input_ids=prompt[None], decoder_input_ids=fed).logits[0, -1].argmax()))
            else:
                whole = torch.cat([prompt, torch.tensor(expected, dtype=torch.int64)])
                expected.append(int(net(input_ids=whole[None]).logits[0, -1].argmax()))
        expected = [i for i in expected if i != END]
        assert row.tolist() == expected + [-1] * (6 - len(expected))


def test_generation_stops_at_the_end_token():
    model = _model("llama", new_tokens=5)
    with torch.no_grad():  # the most likely token is the end, whatever the prompt
        model.backbone.net.model.norm.weight.zero_()
        model.ending[0] = 0  # all logits are equal, so the first is taken
    assert torch.equal(model.predict(_inputs()), torch.full((3, 5), -1))


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_roles_and_projections(family):
    net = language_model((2, 9), family=family, dim=16, depth=2, heads=2, vocabulary=50)
    attention, ffn = net.layers("attention"), net.layers("ffn")
    kinds = [net.projection(name) for name in attention]
    assert len(net.blocks) == (2 if family == "llama" else 4)
    assert kinds == ["query", "key", "value", "output"] * (2 if family == "llama" else 6)
    assert len(ffn) == (6 if family == "llama" else 8)
    assert not set(attention) & set(ffn)
    assert all(net.projection(name) is None for name in ffn)
    assert all(net.get_submodule(n) is layer for n, layer in {**attention, **ffn}.items())
    assert not any("lm_head" in name for name in {**attention, **ffn})
    weights = {id(layer.weight) for layer in {**attention, **ffn}.values()}
    inside = {id(p) for block in net.blocks for p in block.parameters() if p.ndim == 2 and p.shape[1] > 2}
    assert weights == inside


@pytest.mark.parametrize("family", FAMILIES)
def test_blocks_outputs_are_recorded_with_gradients_and_their_padding(family):
    model, labels = _model(family), torch.tensor([0, 3, 2])
    with model.backbone.recorded() as states:
        assert states.outputs == []
        loss = model.losses(_inputs(), labels).sum()
    assert [h.shape[2] for h in states.outputs] == [16] * len(model.backbone.blocks)
    own = (PROMPTS >= 0).sum(1), (ANSWERS[labels] >= 0).sum(1)
    for h, valid in zip(states.outputs, states.valid, strict=True):
        assert h.shape[:2] == valid.shape
    counts = [valid.sum(1).tolist() for valid in states.valid]
    expected = [own[0], own[0], own[1], own[1]] if family == "t5" else [own[0] + own[1]] * 2
    assert counts == [c.tolist() for c in expected]
    gradient = torch.autograd.grad(loss, states.outputs[0])[0]
    assert gradient.abs().sum() > 0
    # Padding takes no part in the loss, so no gradient reaches it.
    assert gradient[~states.valid[0]].abs().sum() == 0
    assert not any(block._forward_hooks for block in model.backbone.blocks)


def test_losses_work_under_vmap_and_functional_call():
    model, labels = _model("llama"), torch.tensor([0, 3, 2])
    values = {f"model.{n}": p.detach() for n, p in model.named_parameters()}
    scored = Losses(model)

    def loss(values, x, y):
        return torch.func.functional_call(scored, values, (x[None], y[None]))[0]

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(values, _inputs(), labels)
    name = next(n for n in each if n.endswith("q_proj.weight"))
    model.losses(_inputs(), labels)[1].backward()
    torch.testing.assert_close(each[name][1], dict(scored.named_parameters())[name].grad)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_parameter_learns(family):
    model = _model(family, dtype=torch.float32).train()
    model.losses(_inputs(), torch.tensor([0, 1, 2])).mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert list(model.head.parameters()) == []


def test_a_learner_loaded_without_its_stream_knows_its_answers():
    model = _model("llama", new_tokens=3)
    other = language_model((2, 9), dim=16, depth=2, heads=2, vocabulary=50).assemble(None, None).double().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.predict(_inputs()), model.predict(_inputs()))
    assert torch.equal(other(_inputs()), model(_inputs()))


# --- options and weights ----------------------------------------------------------------------------------------------


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
