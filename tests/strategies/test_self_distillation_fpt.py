import pytest
import torch
import torch.nn.functional as F
from timm.models import VisionTransformer

from clplat.backbones.base import Classifier
from clplat.backbones.cnn import slim_resnet18
from clplat.backbones.heads import Growing
from clplat.backbones.vit import ViT, vit_micro
from clplat.components.merging.dynamic_ema import DynamicEMA
from clplat.errors import UserError
from clplat.strategies.naive import Naive
from clplat.strategies.self_distillation_fpt import SelfDistillationFPT
from clplat.testing import Subject

N, SHAPE, DIM = 2, (3, 8, 8), 16


def with_class_token():
    sizes = {"img_size": 8, "patch_size": 4, "embed_dim": DIM, "depth": 1, "num_heads": 2}
    return ViT(VisionTransformer(**sizes, num_classes=0))


def make(backbone=with_class_token, **options):
    torch.manual_seed(0)
    own = {"pretraining_steps": N, "decoder_width": 32, "lr": 0.01}
    strategy = SelfDistillationFPT(model=Classifier(backbone(), Growing(DIM, 6)), **{**own, **options})
    strategy._prepare = lambda raw, augmented: raw.view(-1, *SHAPE)
    return strategy


@pytest.fixture
def stream(experiences):
    return experiences(2, per_class=12, features=3 * 8 * 8)  # 3 steps an epoch


def begun(stream, *, steps=0, **options):
    """A strategy after so many steps of its first experience, its optimizer, and a batch."""
    strategy = make(**options)
    strategy.train()
    strategy.grow(stream[0])
    strategy.begin(stream[0])
    optimizer, (x, y) = strategy.configure_optimizers(), stream[0].train.all()
    for number in range(steps):
        step(strategy, optimizer, x[number::steps], y[number::steps])
    return strategy, optimizer, (x, y)


def loss_of(strategy, x, y):
    """The loss of this step."""
    strategy.draws._given = 0
    strategy.raw, strategy.global_batch = x, len(x)
    return strategy.training_step((strategy.prepare(x), y), 0)


def step(strategy, optimizer, x, y):
    loss_of(strategy, x, y).backward()
    strategy.on_before_optimizer_step(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    strategy.after_step()


def weights(module):
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def hidden(strategy, x):
    """The masked part of it."""
    strategy.draws._given = 0
    noise = strategy.draws(strategy.decoder.count, len(x))
    return strategy.decoder(strategy.model.backbone, strategy.prepare(x), noise).mean()


# --- the phases -------------------------------------------------------------------------------------------------------


def test_the_student_begins_where_the_teacher_did_and_the_teacher_stays(stream, drive):
    start, trail = weights(make().model.backbone), []
    first = weights(make().decoder)

    def noting(s):
        trail.append([weights(m) for m in (s.model.backbone, s.decoder, s.other.model, s.other_decoder.model)])

    strategy = drive(make(), stream[:1], epochs=2, each_step=noting)
    backbone, decoder, other, other_decoder = zip(*trail, strict=True)
    assert len(trail) == 2 * N + 2
    assert same(other[0], start)  # while the teacher learns, what it began with is kept
    assert same(other_decoder[0], first)
    assert not same(backbone[0], start)
    assert same(backbone[N - 1], start)
    assert same(decoder[N - 1], first)
    teachers = []
    drive(make(pretraining_steps=N + 1), stream[:1], epochs=3, each_step=lambda s: teachers.append(weights(s.model)))
    learned = {name.removeprefix("backbone."): v for name, v in teachers[N - 1].items() if name.startswith("backbone.")}
    assert same(other[N - 1], learned)
    assert all(same(now, learned) for now in other[N:])
    assert not same(backbone[N], start)
    assert not strategy.other.training
    assert not any(p.requires_grad or p.grad is not None for p in strategy.other.parameters())


def test_a_later_experience_begins_with_what_was_learned(stream, drive):
    strategy = drive(make(), stream[:1], epochs=2)
    learned, decoder = weights(strategy.model.backbone), weights(strategy.decoder)
    strategy.grow(stream[1])
    strategy.begin(stream[1])
    assert same(weights(strategy.other.model), learned)
    assert same(weights(strategy.other_decoder.model), decoder)
    assert strategy.steps == 0


def test_labels_are_read_in_the_last_phase_alone(stream):
    strategy, optimizer, (x, y) = begun(stream)
    head = weights(strategy.model.head)
    for _ in range(2 * N):
        torch.testing.assert_close(loss_of(strategy, x, y), loss_of(strategy, x, 1 - y))
        step(strategy, optimizer, x, y)
    assert same(weights(strategy.model.head), head)
    decoder = weights(strategy.decoder)
    loss = loss_of(strategy, x, y)
    torch.testing.assert_close(loss, F.cross_entropy(strategy.model(strategy.prepare(x)), y))
    assert not torch.allclose(loss, loss_of(strategy, x, 1 - y))
    step(strategy, optimizer, x, y)
    assert not same(weights(strategy.model.head), head)
    assert same(weights(strategy.decoder), decoder)


def test_inputs_are_not_augmented_but_in_the_last_phase(stream):
    strategy, optimizer, (x, y) = begun(stream)
    asked = []

    def prepare(raw, augmented):
        asked.append(augmented)
        return raw.view(-1, *SHAPE)

    strategy._prepare = prepare
    for _ in range(2 * N):
        step(strategy, optimizer, x, y)
    assert asked == [True, False] * 2 * N  # what the loop prepares, and what is learned from
    asked.clear()
    step(strategy, optimizer, x, y)
    assert asked == [True]
    assert all(m.training for m in strategy.model.modules())


def test_each_phase_begins_with_no_moments(stream):
    strategy, optimizer, (x, y) = begun(stream)
    held, plain = [], optimizer.step

    def noting():
        held.append(len(optimizer.state))
        plain()

    optimizer.step = noting
    for _ in range(2 * N + 2):
        step(strategy, optimizer, x, y)
    own, head = (len([*m.parameters()]) for m in (strategy.model.backbone, strategy.model.head))
    decoder = len([*strategy.decoder.parameters()])
    assert held == [0, own + decoder, 0, own + decoder, 0, own + head]


def test_too_few_steps_are_told(stream, drive):
    drive(make(), stream[:1], epochs=2)  # 6 steps
    with pytest.warns(UserWarning, match=r"pretraining_steps: 3 .* none of the 6 steps of e0 .*valid: fewer, or more"):
        drive(make(pretraining_steps=3), stream[:1], epochs=2)


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [1.0, 0.25])
def test_loss_of_teacher_and_student_by_hand(weight, stream):
    strategy, _, (x, y) = begun(stream, weight=weight)
    torch.testing.assert_close(loss_of(strategy, x, y), hidden(strategy, x))
    strategy, _, (x, y) = begun(stream, steps=N + 1, weight=weight)
    h, teacher = (m.net.forward_features(strategy.prepare(x))[:, 0] for m in (strategy.model.backbone,
                                                                             strategy.other.model))  # fmt: skip
    distance = sum(((a - b) ** 2).sum() for a, b in zip(h, teacher.detach(), strict=True)) / len(x)
    assert distance > 0
    parameters = [*strategy.model.backbone.parameters(), *strategy.decoder.parameters()]
    apart = [torch.autograd.grad(part, parameters, allow_unused=True) for part in (hidden(strategy, x), distance)]
    expected = hidden(strategy, x) + weight * distance.detach()
    loss = loss_of(strategy, x, y)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    for p, masked, pull in zip(parameters, *apart, strict=True):
        total = (0 if masked is None else masked) + weight * (0 if pull is None else pull)
        torch.testing.assert_close(p.grad, total, atol=1e-6, rtol=1e-4)


def test_what_is_matched_is_what_the_head_is_given(stream):
    x = stream[0].train.all()[0].view(-1, *SHAPE)
    strategy = make(lambda: vit_micro(SHAPE, patch_size=4, dim=DIM, depth=1, heads=2))
    net = strategy.model.backbone.net
    mean = net.fc_norm(net.forward_features(x).mean(1))
    with torch.no_grad():
        next(strategy.other.parameters()).add_(1)
    other = strategy.other.model.net
    expected = (mean - other.fc_norm(other.forward_features(x).mean(1))).square().sum(1)
    torch.testing.assert_close(strategy._distances(x), expected)


def test_a_teacher_that_did_not_move_pulls_nowhere(stream):
    strategy, _, (x, y) = begun(stream)
    for _ in range(N):
        strategy.after_step()
    torch.testing.assert_close(strategy._distances(strategy.prepare(x)), torch.zeros(len(x)))
    torch.testing.assert_close(loss_of(strategy, x, y), hidden(strategy, x))


def test_distances_are_squares_and_means_over_the_batch(stream, monkeypatch):
    strategy, _, (x, _) = begun(stream)
    x = strategy.prepare(x)
    h, away = strategy.model.features(x), torch.randn(len(x), DIM)
    found = []
    for times in (1, 2):
        monkeypatch.setattr(strategy.other, "forward", lambda _, t=times: h - t * away)
        found.append(strategy._distances(x))
    torch.testing.assert_close(found[1], 4 * found[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0], away.square().sum(1), atol=1e-4, rtol=1e-4)
    monkeypatch.undo()
    strategy, _, _ = begun(stream, steps=N + 1)
    once, twice = (strategy._distances(inputs) for inputs in (x, torch.cat([x, x])))
    torch.testing.assert_close(strategy.mean(twice), strategy.mean(once))


def test_weight_0_is_the_teachers_phase_once_more(stream):
    ends = {}
    for weight in (0.0, 1.0):
        strategy, optimizer, _ = begun(stream, steps=N, weight=weight)
        teacher = weights(strategy.other.model)
        strategy.draws.set_extra_state({"seed": strategy.draws.seed, "step": 0})  # the same masks, and the same data
        x, y = stream[0].train.all()
        for number in range(N):
            step(strategy, optimizer, x[number::N], y[number::N])
        ends[weight] = same(weights(strategy.model.backbone), teacher)
        assert same(weights(strategy.other_decoder.model), weights(strategy.decoder)) == (weight == 0)
    assert ends == {0.0: True, 1.0: False}


def test_masks_are_drawn_anew_in_each_step(stream):
    strategy, optimizer, (x, y) = begun(stream)
    before = torch.get_rng_state()
    first = strategy.draws(4, len(x))
    strategy.draws._given = 0
    step(strategy, optimizer, x, y)
    assert not torch.equal(strategy.draws(4, len(x)), first)
    assert torch.equal(torch.get_rng_state(), before)


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_stopped_in_any_phase_ends_in_the_same_bits():
    subject = Subject("self_distillation_fpt")
    options = subject.options() | {"optimizer": "adamw", "lr": 0.01}
    subject.__dict__["options"] = lambda processes=1: options
    straight = subject.straight
    for stop in range(1, 2 * options["pretraining_steps"] + 2):
        assert straight.state.differences(subject.resumed(stop).state) == []


def test_resumes(stream, resumes):
    assert resumes(make, stream)


def test_refuses_what_it_cannot_do():
    with pytest.raises(UserError, match="backbone: has no patches that can be hidden"):
        make(lambda: slim_resnet18(SHAPE, width=2))
    wrong = {"pretraining_steps": 0, "weight": -1, "mask_ratio": 1.0, "decoder_width": 48, "decoder_depth": 0}
    for option, value in wrong.items():
        with pytest.raises(UserError, match=rf"strategy.{option}: {value!r} is out of range"):
            make(**{option: value})


def test_an_average_over_its_steps_is_of_no_network_and_is_refused():
    (fault,) = DynamicEMA().faults(make())
    assert "trains networks in turn" in fault
    assert not DynamicEMA().faults(Naive(model=Classifier(vit_micro(SHAPE, patch_size=4), Growing(64, 6))))
