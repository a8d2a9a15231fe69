import families
import pytest
import torch
import torch.nn.functional as F

from clplat.data.batches import rounds
from clplat.errors import UserError
from clplat.strategies.lwf import distillation
from clplat.strategies.naive import Naive
from clplat.strategies.vr_lwf import VRLwF

N, LENGTH = 7, 3


@pytest.fixture
def stream():
    return families.pictures()


def net(stream, seed=0):
    torch.manual_seed(seed)
    return families.model("clip", stream).double()


def make(stream, seed=0, **options):
    torch.manual_seed(seed)
    strategy = VRLwF(model=net(stream, seed), **{"sentences": N, "length": LENGTH, "lr": 0.01, **options}).double()
    strategy._prepare = lambda raw, augmented: raw.double()
    return strategy


def begun(stream, moved=0.0, **options):
    """A strategy in its first experience, whose image tower has moved since; and a batch."""
    strategy = make(stream, **options)
    strategy.grow(stream[0])
    strategy.begin(stream[0])
    strategy.training_data(stream[0])
    with torch.no_grad():
        strategy.model.backbone.net.visual_projection.weight.mul_(1 + moved * torch.arange(16.0)[:, None])
    x, y = stream[0].train.all()
    strategy.global_batch = len(x)
    return strategy, (x.double(), y)


def entropy(logits):
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def test_sentences_are_random_words_between_begin_and_end(stream):
    strategy = make(stream, sentences=400)
    found = strategy._vocabulary(0)
    first, last = int(families.WORDS[0, 0]), families.END
    assert found.shape == (400, LENGTH + 2)
    assert (found[:, 0] == first).all()
    assert (found[:, -1] == last).all()
    assert set(found[:, 1:-1].flatten().tolist()) == set(range(families.IDS)) - {first, last}
    torch.rand(3)
    assert torch.equal(strategy._vocabulary(0), found)
    assert not torch.equal(strategy._vocabulary(1), found)
    assert not torch.equal(make(stream, seed=1, sentences=400)._vocabulary(0), found)


def test_what_is_held_of_them_is_what_the_teacher_reads(stream, drive):
    strategy = drive(make(stream), list(stream))
    expected = strategy.teacher.model.backbone.text_features(strategy._vocabulary(1))
    torch.testing.assert_close(strategy.anchors, expected.detach(), check_dtype=False)
    now = strategy.model.backbone.text_features(strategy._vocabulary(1))
    assert not torch.allclose(now, expected)


# --- the loss ---------------------------------------------------------------------------------------------------------


def test_loss_by_hand(stream):
    strategy, (x, y) = begun(stream, 0.05, image_weight=0.7, text_weight=0.3, temperature=1.5, label_smoothing=0.2)
    loss = strategy.training_step((x, y), 0)
    teacher, student = strategy.teacher.model.backbone, strategy.model.backbone
    z = teacher.text_features(strategy._vocabulary(0))
    images = x[rounds(len(x), 0, len(x), int(strategy.seed), torch.device("cpu"))]
    old, new = (t.scale() * t.features(images) @ z.T / 1.5 for t in (teacher, student))
    by_image = -(old.softmax(1) * new.log_softmax(1)).sum(1).mean()
    by_text = -(old.softmax(0) * new.log_softmax(0)).sum(0).mean()
    prompts = student.text_features(families.WORDS[:2])  # of this experience's classes alone
    logits = student.scale() * student.features(x) @ prompts.T
    expected = F.cross_entropy(logits, y, label_smoothing=0.2) + 1.5**2 * (0.7 * by_image + 0.3 * by_text)
    torch.testing.assert_close(loss, expected)


def test_where_nothing_has_moved_it_has_no_gradient(stream):
    strategy, batch = begun(stream)
    plain, _ = begun(stream, image_weight=0.0, text_weight=0.0)
    loss, other = strategy.training_step(batch, 0), plain.training_step(batch, 0)
    images = batch[0]
    s = strategy.teacher.model.backbone.scale() * strategy.teacher.model.features(images) @ strategy.anchors.T / 2
    torch.testing.assert_close(loss - other, 4 * (entropy(s).mean() + entropy(s.T).mean()))
    for a, b in zip(gradients(strategy, loss), gradients(plain, other), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def gradients(strategy, loss, tower="backbone.net"):
    chosen = [p for n, p in strategy.model.named_parameters() if n.startswith(tower) and p.requires_grad]
    return torch.autograd.grad(loss, chosen, materialize_grads=True)


def test_it_moves_the_image_tower_and_never_the_text_tower(stream):
    found = {}
    for weight in (0.0, 1.0):
        for tower in ("backbone.net.text", "backbone.net.vision"):
            strategy, batch = begun(stream, 0.05, image_weight=weight, text_weight=weight)
            found[weight, tower] = gradients(strategy, strategy.training_step(batch, 0), tower)
    texts, images = (
        list(zip(found[0.0, t], found[1.0, t], strict=True)) for t in ("backbone.net.text", "backbone.net.vision")
    )
    assert texts
    assert all(torch.equal(a, b) for a, b in texts)
    assert not all(torch.allclose(a, b) for a, b in images)


def test_with_the_prompts_of_the_classes_it_is_lwf(stream):
    strategy, batch = begun(stream, 0.05, sentences=2, text_weight=0.0)
    plain, _ = begun(stream, 0.05, image_weight=0.0, text_weight=0.0)
    with torch.no_grad():
        strategy.anchors.copy_(strategy.teacher.model.backbone.text_features(families.WORDS[:2]))
    x = batch[0]
    student = strategy.model.backbone.scale() * strategy.model.features(x) @ strategy.anchors.T
    teacher = strategy.teacher(x)[:, :2]
    lwf = plain.training_step(batch, 0)
    mine = gradients(strategy, strategy.training_step(batch, 0), "backbone.net.vision")
    pull = gradients(strategy, 4 * distillation(student, teacher, 2.0).mean(), "backbone.net.vision")
    for a, b, c in zip(mine, gradients(plain, lwf, "backbone.net.vision"), pull, strict=True):
        torch.testing.assert_close(a, b + c)


def test_one_sentence_or_one_image_teaches_nothing(stream):
    for options, count in (({"sentences": 1, "text_weight": 0.0}, 6), ({"image_weight": 0.0}, 1)):
        losses = []
        for weight in (1.0, 0.0):
            own = {
                k: v * weight if k.endswith("weight") else v
                for k, v in {"image_weight": 1.0, "text_weight": 1.0, **options}.items()
            }
            strategy, (x, y) = begun(stream, 0.05, **own)
            strategy.global_batch = count
            losses.append(strategy.training_step((x[:count], y[:count]), 0))
        torch.testing.assert_close(*losses)


# --- a run ------------------------------------------------------------------------------------------------------------


def test_without_distillation_it_is_fine_tuning(stream, drive, equal):
    plain = {"optimizer": "sgd", "lr": 0.05, "schedule": "constant", "warmup": 0.0}
    mine = make(stream, image_weight=0.0, text_weight=0.0, label_smoothing=0.0, **plain)
    other = Naive(model=net(stream), lr=0.05)
    other._prepare = mine._prepare
    drive(mine, list(stream))
    drive(other, list(stream))
    for a, b in zip(mine.model.parameters(), other.model.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_the_teacher_is_the_model_before_and_stays(stream, drive):
    strategy, seen = make(stream), []
    before = {k: v.clone() for k, v in strategy.model.state_dict().items()}
    for e in stream:
        drive(strategy, [e], each_step=lambda s: seen.append(s.model.backbone.net.logit_scale.item()))
        teacher = strategy.teacher.model.state_dict()
        assert all(torch.equal(teacher[k], before[k]) for k in before)
        before = {k: v.clone() for k, v in strategy.model.state_dict().items()}
        assert not all(torch.equal(teacher[k], before[k]) for k in before)
    assert len(set(seen)) == 1
    assert not any(p.requires_grad for p in strategy.teacher.parameters())


def test_its_images_come_round_shuffled_and_plain(stream, drive):
    strategy, seen = make(stream), []
    inner = strategy.teacher.model.backbone.features
    strategy.teacher.model.backbone.features = lambda images: seen.append(images) or inner(images)
    noted = []
    strategy._prepare = lambda raw, augmented: noted.append(augmented) or raw.double()
    x = stream[0].train.all()[0].double()
    drive(strategy, [stream[0]], batch=len(x) // 2, epochs=2)
    assert noted == [True, False] * 4  # the batch, and what is distilled on
    once, again = torch.cat(seen[:2]), torch.cat(seen[2:])
    for found in (once, again):
        assert sorted(found.sum((1, 2, 3)).tolist()) == sorted(x.sum((1, 2, 3)).tolist())
    assert not torch.equal(once, again)
    drive(strategy, [stream[1]], epochs=1)
    assert strategy.taken == len(x)  # the rounds begin anew
    assert strategy._data is None  # nothing is held of an experience that is over


def test_resumes(stream, resumes):
    assert resumes(lambda: make(stream), list(stream))


def test_refuses_what_it_cannot_do(stream, model):
    with pytest.raises(UserError, match=r"backbone: has no text tower that reads random sentences \(valid: clip\)"):
        VRLwF(model=model())
    wrong = {
        "sentences": 0,
        "length": 127,
        "temperature": 0,
        "image_weight": -1,
        "text_weight": -1,
        "label_smoothing": 1,
    }
    for option, value in wrong.items():
        with pytest.raises(UserError, match=rf"strategy.{option}: {value} is out of range"):
            make(stream, **{option: value})
