import pytest
import torch
import torch.nn.functional as F

from clplat.components.per_parameter import trainable
from clplat.strategies.naive import Naive
from clplat.strategies.si import SI


def test_loss_by_hand(linear):
    strategy = SI(model=linear(), penalty=0.5)
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([0])
    plain = strategy.training_step((x, y), 0).item()  # no importance yet
    with torch.no_grad():
        strategy.importance.of(["head.bias"])[0].copy_(torch.tensor([2.0, 3.0]))
        strategy.anchor.of(["head.bias"])[0].copy_(torch.tensor([1.0, -0.5]))  # the bias is (0, 0.5)
    assert abs(strategy.training_step((x, y), 0).item() - (plain + 0.5 * (2 * 1 + 3 * 1))) < 1e-5


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_path_integral_equals_one_kept_by_hand(experiences, model, drive, clip, accumulate):
    """With momentum, clipping and accumulation: the task's own gradient times what the optimizer did."""
    stream = experiences(2)
    strategy = SI(model=model(), penalty=2.0, momentum=0.5)
    drive(strategy, stream[:1], epochs=1)
    strategy.grow(stream[1])
    start = [p.detach().clone() for p in trainable(strategy.model).values()]
    step, expected, inner = {"before": None}, [torch.zeros_like(p) for p in start], strategy.training_step
    gradient = [torch.zeros_like(p) for p in start]

    def watched(batch, k):
        parameters = list(trainable(strategy.model).values())
        step["before"] = [p.detach().clone() for p in parameters]
        loss = F.cross_entropy(strategy.model(batch[0]), batch[1])
        for total, g in zip(gradient, torch.autograd.grad(loss, parameters), strict=True):
            total += g / accumulate
        return inner(batch, k)

    def each_step(s):
        for i, p in enumerate(trainable(s.model).values()):
            expected[i] -= gradient[i] * (p.detach() - step["before"][i])
            gradient[i].zero_()

    strategy.training_step = watched
    strategy.end = lambda e: None
    drive(strategy, stream[1:], epochs=1, batch=6, clip=clip, accumulate=accumulate, each_step=each_step)
    found = strategy.path.of(trainable(strategy.model))
    assert max(w.abs().max() for w in found) > 0
    for w, e in zip(found, expected, strict=True):
        torch.testing.assert_close(w, e, rtol=1e-3, atol=1e-5)


def test_path_adds_up_to_the_fall_of_the_loss(experiences, model, drive):
    """For small steps on one batch Σ ω is the loss lost."""
    stream = experiences(1)
    strategy = SI(model=model(), lr=0.002)
    strategy.grow(stream[0])
    x, y = stream[0].train.all()
    before = F.cross_entropy(strategy.model(x), y).item()
    strategy.end = lambda e: None
    drive(strategy, stream, batch=24, epochs=100)
    fall = before - F.cross_entropy(strategy.model(x), y).item()
    total = sum(w.sum().item() for w in strategy.path.of(trainable(strategy.model)))
    assert fall > 0.05
    assert abs(total - fall) < 0.02 * fall


def test_importance_by_hand_at_the_end_of_an_experience(linear):
    strategy = SI(model=linear(), damping=0.5)
    with torch.no_grad():
        strategy.importance.of(["head.bias"])[0].copy_(torch.tensor([1.0, 1.0]))
        strategy.anchor.of(["head.bias"])[0].copy_(torch.tensor([1.0, 0.0]))  # the bias is (0, 0.5)
        strategy.path.of(["head.bias"])[0].copy_(torch.tensor([3.0, -6.0]))
    strategy.end(None)
    assert strategy.importance.of(["head.bias"])[0].tolist() == [1 + 3 / 1.5, 0.0]  # 1 - 6 / 0.75 < 0
    assert strategy.path.of(["head.bias"])[0].tolist() == [0.0, 0.0]


def test_zero_penalty_is_naive(experiences, model, drive, equal):
    stream = experiences()
    assert equal(drive(SI(model=model(), penalty=0), stream).model, drive(Naive(model=model()), stream).model)


def test_important_weights_are_held(experiences, model, drive):
    stream, moved = experiences(2), []
    for weight in (0.0, 5.0):
        strategy = drive(SI(model=model(), penalty=weight), stream[:1], epochs=5)
        names = trainable(strategy.model)
        start = [p.detach().clone() for p in names.values()]
        importance = [o.clone() for o in strategy.importance.of(names)]
        assert max(o.max() for o in importance) > 0
        drive(strategy, stream[1:], epochs=5)
        after = [p[: len(s)] for p, s in zip(trainable(strategy.model).values(), start, strict=True)]
        moved.append(sum((o * (p - s) ** 2).sum().item() for o, p, s in zip(importance, after, start, strict=True)))
    assert moved[1] < 0.3 * moved[0]


def test_resumes(experiences, model, resumes):
    assert resumes(lambda: SI(model=model(), penalty=0.5), experiences())
