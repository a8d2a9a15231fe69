"""Language models: scores, losses and answers against a plain loop over transformers."""

import pytest
import torch
import torch.nn.functional as F
from small_language import ANSWERS, END, FAMILIES

from clplat.backbones.answering import _by_length
from clplat.backbones.language_model import language_model
from clplat.components.losses import Losses
from clplat.stream import Answers

PROMPTS = torch.tensor([[1, 20, 21, 22, 23], [1, 30, -1, -1, -1], [1, 40, 41, -1, -1]])  # (B, L)
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
