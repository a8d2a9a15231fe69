import copy

import numpy as np
import pytest
import torch

from clplat.errors import UserError
from clplat.strategies.naive import Naive
from clplat.strategies.scrub import SCRUB


def log_softmax(logits):
    """Independent: float64, by its definition."""
    return logits - np.log(np.exp(logits).sum(1, keepdims=True))


def begun(model, request_for, experiences, **options):
    """A strategy in double precision whose request for class 0 has begun; its teacher is then moved off the student."""
    (e,) = experiences(1)
    strategy = SCRUB(model=model(), memory=12, **options).double()
    for x in (e, request_for(1, e, (0,))):
        strategy.grow(x)
    strategy.begin(e)
    strategy.end(e)
    gone = request_for(1, e, (0,))
    strategy.begin(gone)
    strategy.before.take(strategy.model)
    with torch.no_grad():
        for p in strategy.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    strategy.double()
    strategy.training_data(gone)
    strategy.global_batch = 8
    return strategy, gone


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_both_losses_are_the_papers(temperature, model, request_for, experiences):
    strategy, _ = begun(model, request_for, experiences, temperature=temperature, distill=0.3, label_weight=0.7)
    strategy._prepare = lambda raw, augmented: raw.double()
    erased = strategy._part(strategy._erased, 0, 8)
    retained = strategy._part(strategy._kept, 0, 8)

    def apart(x):
        with torch.no_grad():
            student, teacher = (m(x.double()).numpy() / temperature for m in (strategy.model, strategy.before))
        q, p = log_softmax(student), log_softmax(teacher)
        return temperature**2 * (np.exp(p) * (p - q)).sum(1)

    down = strategy.forget_step((None, None), 0).item()  # a min step, then the max steps
    up = strategy.forget_step((None, None), 1).item()
    assert up == pytest.approx(-apart(erased[0]).mean(), abs=1e-10, rel=0)
    x, y = retained
    with torch.no_grad():
        label = -log_softmax(strategy.model(x.double()).numpy())[np.arange(8), y.numpy()]
    assert down == pytest.approx((0.3 * apart(x) + 0.7 * label).mean(), abs=1e-10, rel=0)


def test_max_steps_come_once_over_what_is_to_be_erased_in_the_first_epochs_only(
    model, request_for, experiences, drive, answer
):
    stream, steps = experiences(2), []
    strategy = drive(SCRUB(model=model(), memory=40, max_epochs=2), stream)
    take, part = strategy._next, strategy._part
    strategy._next = lambda count: (steps.append("max"), take(count))[1]

    def noted(data, drawn, count):
        if data is strategy._kept:
            steps.append("min")
        return part(data, drawn, count)

    strategy._part = noted
    answer(strategy, request_for(2, stream[0], (0,)), epochs=3)  # 12 to erase, 30 retained, 8 at a time
    epoch = ["min"] + ["max"] * 2 + ["min"] * 3
    assert steps == epoch * 2 + ["min"] * 6


def test_an_epoch_passes_over_all_that_is_retained(model, request_for, experiences, drive, answer):
    stream, seen = experiences(2), []
    strategy = drive(SCRUB(model=model(), memory=40, max_epochs=0), stream)
    part = strategy._part
    strategy._part = lambda *a: (seen.append(found := part(*a)), found)[1]
    answer(strategy, request_for(2, stream[0], (0,)), epochs=1)
    retained = strategy.memory.data().all()[0]
    drawn = torch.cat([x for x, _ in seen])
    assert len({tuple(x) for x in drawn.tolist()}) == len(retained)
    assert not {tuple(x) for x in drawn.tolist()} - {tuple(x) for x in retained.tolist()}


def test_a_masked_class_is_no_part_of_the_divergence(linear):
    from clplat.components.losses import divergence

    z = torch.tensor([[0.3, -torch.inf, 1.0]], dtype=torch.float64, requires_grad=True)
    t = torch.tensor([[1.0, -torch.inf, 0.0]], dtype=torch.float64)
    found = divergence(z, t)
    p, q = log_softmax(t.numpy()[:, [0, 2]]), log_softmax(z.detach().numpy()[:, [0, 2]])
    assert found.item() == pytest.approx((np.exp(p) * (p - q)).sum(), abs=1e-12)
    found.sum().backward()
    assert z.grad.isfinite().all()


def test_the_teacher_is_the_model_before_the_request_and_knows_no_more_after_it(
    model, request_for, experiences, drive, answer, equal
):
    stream, teachers = experiences(1), []
    strategy = drive(SCRUB(model=model(), memory=12), stream)
    before = copy.deepcopy(strategy.model)
    note = lambda *_: teachers.append(equal(strategy.before.model, before))  # noqa: E731
    answer(strategy, request_for(1, stream[0], (0,)), each_step=note)
    assert set(teachers) == {True}
    assert not equal(strategy.model, before)
    assert equal(strategy.before.model, strategy.model)


def test_learning_is_plain_training(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(SCRUB(model=model()), stream).model, drive(Naive(model=model()), stream).model)


def test_it_forgets_the_class_keeps_the_rest_and_learns_it_again(model, forgets_and_learns_again):
    forgets_and_learns_again(SCRUB(model=model(), lr=0.2, memory=24, forget_lr=0.05), epochs=8)


@pytest.mark.parametrize("option", ["max_epochs", "distill", "label_weight", "temperature"])
def test_refuses_values_out_of_range(option, model):
    with pytest.raises(UserError, match=rf"strategy.{option}: -1 is out of range"):
        SCRUB(model=model(), **{option: -1})
