"""GradDiff, and NPO, which answers a request by another loss on the same batches."""

import copy

import families
import numpy as np
import pytest
import torch

from clplat.errors import UserError
from clplat.strategies.grad_diff import GradDiff
from clplat.strategies.naive import Naive
from clplat.strategies.npo import NPO

BOTH = [GradDiff, NPO]


def loss_of(net, x, y):
    """Independent: float64 cross-entropy (B,) by its definition."""
    with torch.no_grad():
        z = net(x.double()).numpy()
    return np.log(np.exp(z).sum(1)) - z[np.arange(len(y)), y.numpy()]


def begun(cls, model, request_for, experiences, **options):
    """A strategy in double precision whose request for class 0 has begun, the model since moved."""
    torch.manual_seed(1)
    (e,) = experiences(1)
    strategy = cls(model=model(), memory=12, **options)
    strategy.grow(e)
    strategy.begin(e)
    strategy.end(e)
    gone = request_for(1, e, (0,))
    strategy.grow(gone)
    strategy.begin(gone)
    strategy.double()
    with torch.no_grad():
        for p in strategy.model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    strategy._prepare = lambda raw, augmented: raw.double()
    x, y = strategy.training_data(gone).all()
    strategy.global_batch = 8
    return strategy, (x[:8].double(), y[:8])


@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_grad_diff_by_hand(weight, model, request_for, experiences):
    strategy, (x, y) = begun(GradDiff, model, request_for, experiences, retain_weight=weight)
    raw, kept = strategy._part(strategy._kept, 0, 8)
    expected = -loss_of(strategy.model, x, y).mean() + weight * loss_of(strategy.model, raw, kept).mean()
    assert set(y.tolist()) == {0}
    assert set(kept.tolist()) == {1}
    assert strategy.forget_step((x, y), 0).item() == pytest.approx(expected, abs=1e-10, rel=0)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_npo_by_hand(beta, model, request_for, experiences):
    strategy, (x, y) = begun(NPO, model, request_for, experiences, retain_weight=0.7, beta=beta)
    raw, kept = strategy._part(strategy._kept, 0, 8)
    ratio = loss_of(strategy.before.model, x, y) - loss_of(strategy.model, x, y)  # log p(θ) − log p(θ_o)
    expected = (2 / beta * np.log1p(np.exp(beta * ratio))).mean()
    expected += 0.7 * loss_of(strategy.model, raw, kept).mean()
    assert strategy.forget_step((x, y), 0).item() == pytest.approx(expected, abs=1e-10, rel=0)


def test_npo_at_the_model_before_has_the_gradient_of_grad_diff(model, request_for, experiences):
    """σ(0) = 1/2: both weigh each sample by 1."""
    found = []
    for cls in BOTH:
        strategy, batch = begun(cls, model, request_for, experiences)
        if strategy.before is not None:
            strategy.before.take(strategy.model)
        strategy.forget_step(batch, 0).backward()
        found.append(torch.cat([p.grad.flatten() for p in strategy.model.parameters()]))
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)


def test_npo_of_text_weighs_an_answer_by_the_probability_of_all_its_tokens():
    """Independent: log-softmax of the model's logits, summed over the tokens of each answer."""
    stream = families.texts(0, free=True)
    torch.manual_seed(0)
    strategy = NPO(model=families.model("llama", stream), beta=0.5, memory=4)
    *_, gone = stream
    strategy.grow(gone)
    strategy.begin(gone)
    with torch.no_grad():
        for p in strategy.model.parameters():
            p.add_(0.05 * torch.randn_like(p))
    strategy.double()
    x, y = strategy.training_data(gone).all()
    strategy.global_batch = len(x)

    def log_p(net):
        with torch.no_grad():
            z = net.backbone.answer_logits(x[:, 0], y).numpy()  # (B, A, V)
        logs = z - np.log(np.exp(z - z.max(2, keepdims=True)).sum(2, keepdims=True)) - z.max(2, keepdims=True)
        words = y.numpy()
        each = np.take_along_axis(logs, words.clip(0)[:, :, None], 2)[:, :, 0]
        return (each * (words >= 0)).sum(1)

    assert len({int(n) for n in (y >= 0).sum(1)}) > 1  # answers of several lengths
    ratio = log_p(strategy.model) - log_p(strategy.before.model)
    expected = (2 / 0.5 * np.log1p(np.exp(0.5 * ratio))).mean()
    # The model reads logits in single precision (`.float()` in its losses).
    assert strategy.forget_step((x, y), 0).item() == pytest.approx(expected, abs=1e-4, rel=0)


@pytest.mark.parametrize("cls", BOTH)
def test_an_epoch_runs_over_what_is_erased_and_each_retained_sample_comes_before_one_comes_again(
    cls, model, request_for, experiences, drive, answer
):
    stream, seen = experiences(2, per_class=16), []
    strategy = drive(cls(model=model(), memory=40), stream)
    part = strategy._part
    strategy._part = lambda *a: (seen.append(found := part(*a)), found)[1]
    gone = request_for(2, stream[0], (0,))
    kept = strategy.memory.data().subset((strategy.memory.data().targets() != 0).nonzero()[:, 0])
    answer(strategy, gone, epochs=2)  # two epochs of two batches: 32 retained ones drawn of the 30 that are left
    drawn = [tuple(x) for inputs, _ in seen for x in inputs.tolist()]
    assert len(drawn) == 32
    assert len(set(drawn[: len(kept)])) == len(kept) == 30
    assert strategy._kept is None


@pytest.mark.parametrize("cls", BOTH)
def test_learning_is_plain_training(cls, experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(cls(model=model()), stream).model, drive(Naive(model=model()), stream).model)


def test_the_copy_is_of_the_model_before_the_request_and_knows_no_more_after_it(
    model, request_for, experiences, drive, answer, equal
):
    stream, copies = experiences(1), []
    strategy = drive(NPO(model=model(), memory=12), stream)
    before = copy.deepcopy(strategy.model)
    answer(strategy, request_for(1, stream[0], (0,)), each_step=lambda *_: copies.append(
        equal(strategy.before.model, before)))  # fmt: skip
    assert set(copies) == {True}
    assert not equal(strategy.model, before)
    assert equal(strategy.before.model, strategy.model)


@pytest.mark.parametrize("cls", BOTH)
def test_it_forgets_the_class_keeps_the_rest_and_learns_it_again(cls, model, forgets_and_learns_again):
    forgets_and_learns_again(cls(model=model(), lr=0.2, memory=24, forget_lr=0.02), epochs=10)


@pytest.mark.parametrize(("cls", "option"), [(GradDiff, "retain_weight"), (NPO, "beta")])
def test_refuses_values_out_of_range(cls, option, model):
    with pytest.raises(UserError, match=rf"strategy.{option}: -1 is out of range"):
        cls(model=model(), **{option: -1})
