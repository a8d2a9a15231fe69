"""CLIP: logits against transformers' own, what competes in training, weights and faults."""

import pytest
import torch
import torch.nn.functional as F

from clplat.backbones.clip import clip
from clplat.errors import MissingError, UserError
from clplat.strategies.er import ER
from clplat.stream import Answers, Experience, Kind

PROMPTS = torch.tensor([[1, 9, 8, 2], [1, 7, 2, -1], [1, 30, 31, 2], [1, 5, 2, -1]])  # (C, T), each ends with 2
ROUNDING = {"atol": 1e-5, "rtol": 1e-5}  # transformers takes a softmax in float32, whatever the weights


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def _backbone(**options):
    return clip((3, 16, 16), dim=16, heads=2, vocabulary=50, **options)


def _model(tasks=(), dtype=torch.float64):
    return _backbone().assemble(None, Answers(PROMPTS, 2, 50, tasks=tasks)).to(dtype).eval()


def _images(count=3, side=16):
    return torch.randn(count, 3, side, side, dtype=torch.float64)


def _experience(classes, kind=Kind.LEARN):
    return Experience(index=0, name="e", kind=kind, train=None, classes=classes)


def test_logits_are_those_of_transformers():
    model, x = _model(), _images()
    net = model.backbone.net
    for c, prompt in enumerate(PROMPTS):
        alone = prompt[prompt >= 0][None]
        text = net.text_projection(net.text_model(input_ids=alone).last_hidden_state[:, -1])
        image = net.visual_projection(net.vision_model(pixel_values=x).pooler_output)
        expected = net.logit_scale.exp() * F.cosine_similarity(image, text)
        torch.testing.assert_close(model(x)[:, c], expected, **ROUNDING)
    whole = net(input_ids=PROMPTS[[0, 2]], pixel_values=x)  # equal lengths, nothing to pad
    texts = net.text_model(input_ids=PROMPTS[[0, 2]]).last_hidden_state[:, -1]
    expected = F.normalize(whole.image_embeds, dim=-1) @ F.normalize(net.text_projection(texts), dim=-1).T
    torch.testing.assert_close(model(x)[:, [0, 2]], net.logit_scale.exp() * expected, **ROUNDING)


def test_features_have_length_one_and_padding_of_prompts_changes_nothing():
    model, x = _model(), _images()
    torch.testing.assert_close(model.features(x).norm(dim=1), torch.ones(3, dtype=torch.float64))
    wide = F.pad(PROMPTS, (0, 5), value=-1)
    torch.testing.assert_close(model.backbone.text_features(wide), model.backbone.text_features(PROMPTS), **ROUNDING)


def test_the_current_classes_and_replayed_ones_compete():
    model, x = _model(), _images()
    logits = model(x)
    model.grow(_experience((2, 3)))
    y = torch.tensor([3, 2, 2])
    expected = F.cross_entropy(logits[:, [2, 3]], y - 2, reduction="none")
    torch.testing.assert_close(model.losses(x, y), expected, **ROUNDING)
    y = torch.tensor([3, 0, 2])  # the second is replayed
    expected = F.cross_entropy(logits[:, [0, 2, 3]], torch.tensor([2, 0, 1]), reduction="none")
    torch.testing.assert_close(model.losses(x, y), expected, **ROUNDING)
    torch.testing.assert_close(model.among(x, torch.tensor([3, 0])), logits[:, [3, 0]], **ROUNDING)


def test_all_classes_met_compete_where_the_strategy_replays():
    model, x, y = _model(), _images(), torch.tensor([3, 3, 3])
    ER(model=model)
    logits = model(x)
    for classes in ((0,), (3,)):
        model.grow(_experience(classes))
    expected = F.cross_entropy(logits[:, [0, 3]], torch.tensor([1, 1, 1]), reduction="none")
    torch.testing.assert_close(model.losses(x, y), expected, **ROUNDING)  # whatever else is in the batch
    model.grow(_experience((0,), Kind.FORGET))
    torch.testing.assert_close(model.losses(x, y), F.cross_entropy(logits, y, reduction="none"), **ROUNDING)
    model.grow(_experience((2,)))  # a request is no past experience
    expected = F.cross_entropy(logits[:, [0, 2, 3]], torch.tensor([2, 2, 2]), reduction="none")
    torch.testing.assert_close(model.losses(x, y), expected, **ROUNDING)


def test_a_told_task_restricts_the_classes_of_unseen_tasks_too():
    model, x = _model(tasks=((0, 1), (2, 3))), _images()
    logits = model.predict(x)
    assert torch.equal(logits, model(x))
    for task, own in enumerate(([0, 1], [2, 3])):
        found = model.predict(x, task)
        assert torch.equal(found[:, own], logits[:, own])
        assert found.isneginf().sum() == 2 * len(x)


def test_both_towers_learn_and_the_scale_does_not():
    model = _model(dtype=torch.float32).train()
    model.grow(_experience((0, 1, 2, 3)))
    model.losses(_images().float(), torch.tensor([0, 1, 2])).mean().backward()
    net = model.backbone.net
    assert not net.logit_scale.requires_grad
    for tower in (net.vision_model, net.text_model, net.visual_projection, net.text_projection):
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in tower.parameters())
    assert list(model.head.parameters()) == []


def test_blocks_roles_and_records():
    model, x = _model(), _images()
    net = model.backbone
    assert len(net.blocks) == 4
    assert [net.projection(n) for n in net.layers("attention")] == ["key", "value", "query", "output"] * 4
    assert len(net.layers("ffn")) == 8
    model.grow(_experience((0, 1)))
    with net.recorded() as states:
        model.losses(x, torch.tensor([0, 1, 1]))
    assert [tuple(h.shape[:2]) for h in states.outputs] == [(3, 5)] * 2 + [(2, 4)] * 2  # patches and class; tokens


def test_images_are_resized_and_a_learner_loads_without_its_stream(tmp_path):
    model = _model(tasks=((0, 1), (2, 3)))
    model.backbone.net.save_pretrained(tmp_path)
    large = clip((3, 24, 24), weights=str(tmp_path)).double()
    x = _images(side=24)
    small = F.interpolate(x, 16, mode="bilinear", align_corners=False, antialias=True)
    torch.testing.assert_close(large.features(x), model.features(small))
    other = clip((3, 16, 16), config=str(tmp_path)).assemble(None, None).double().eval()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.predict(small, 1), model.predict(small, 1))


def test_faults_are_told_in_one_line(tmp_path):
    for shape in ((1, 16, 16), (3, 16, 8)):
        with pytest.raises(UserError, match="clip takes square colour images"):
            clip(shape)
    for key, value in (("heads", 0), ("dim", 15), ("depth", 0), ("patch_size", 5), ("vocabulary", 0)):
        with pytest.raises(UserError, match=rf"backbone\.{key}: "):
            clip((3, 16, 16), **{"heads": 2, key: value})
    with pytest.raises(UserError, match="clip needs classes named in words"):
        _backbone().assemble(None, Answers(torch.empty(0, 0), 2, 50))
    with pytest.raises(UserError, match=r"stream\.tokenizer: gives 51 ids, but the model knows 50"):
        _backbone().assemble(None, Answers(PROMPTS, 2, 51))
    with pytest.raises(UserError, match=r"prompts of 200 tokens do not fit into the model's context of 128"):
        _backbone().assemble(None, Answers(torch.ones(4, 200, dtype=torch.int64), 2, 50))
    (tmp_path / "open_clip_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"layout of open_clip, which is not read \(valid: that of transformers, "):
        clip((3, 16, 16), weights=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(UserError, match="holds no CLIP"):
        clip((3, 16, 16), weights=str(tmp_path))
    _backbone().net.config.save_pretrained(tmp_path)
    with pytest.raises(MissingError, match=r"put model\.safetensors there"):
        clip((3, 16, 16), weights=str(tmp_path))
