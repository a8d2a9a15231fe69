import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clplat import Experience, Kind
from clplat.backbones._wrapped import Wrapped
from clplat.backbones.base import Classifier
from clplat.backbones.heads import Growing
from clplat.errors import UserError
from clplat.strategies.er import ER
from clplat.strategies.fpf import FPF
from clplat.strategies.naive import Naive


def make(net, **options):
    return FPF(model=net, **{"memory": 9, "replay_batch": 4, "tune_steps": 3, "tune_batch": 4, "lr": 0.05, **options})


def weights(strategy):
    return {n: p.detach().clone() for n, p in strategy.model.named_parameters()}


def tuned(strategy):
    """Makes the strategy note for each pass at which step it came, and the weights before and after it."""
    found, inner = [], strategy._tune

    def noting():
        before = weights(strategy)
        inner()
        found.append((int(strategy.steps), before, weights(strategy)))

    strategy._tune = noting
    return found


# --- how much a tensor changes ----------------------------------------------------------------------------------------


def test_change_by_hand(linear):
    strategy = make(linear())
    strategy.begin(Experience(0, "a", Kind.LEARN, None, classes=(0, 1)))
    head = strategy.model.head
    with torch.no_grad():
        head.weight += torch.tensor([[1.0, -2.0], [0.0, 3.0]])
        head.bias -= 4
        strategy._measure()
        assert strategy.drift.tolist() == [6 / 4, 4.0]  # a mean over numbers, so that sizes do not count
        strategy._measure()
        assert strategy.drift.tolist() == [6 / 4, 4.0]  # nothing has changed since
        head.bias += 1
        strategy._measure()
    assert strategy.drift.tolist() == [6 / 4, 5.0]
    strategy.begin(Experience(1, "b", Kind.LEARN, None, classes=(0, 1)))
    assert strategy.drift.tolist() == [0.0, 0.0]


def test_it_is_taken_over_each_epoch_and_what_a_pass_changes_does_not_count(experiences, model, drive):
    strategy, trail, own = make(model(), at_end=False), [], []
    (e,) = experiences(1)
    drive(strategy, [e], epochs=3, batch=12, each_step=lambda s: trail.append(weights(s)))
    # Of 6 steps those after 2 and 4 end an epoch; the change of the last epoch would count when a pass comes.
    for name in trail[0]:
        own.append((trail[3][name] - trail[1][name]).abs().double().mean().item())
    first = make(model(), at_end=False)
    drive(first, [e], epochs=2, batch=12)
    torch.testing.assert_close(strategy.drift - first.drift, torch.tensor(own, dtype=torch.float64))
    strategy._tune()
    assert not any(
        (p - old).any() for p, old in zip(strategy.model.parameters(), strategy.before.of(trail[0]), strict=True)
    )


# --- passes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.5])
def test_a_pass_moves_what_changed_most_and_nothing_else(share, experiences, model, drive):
    strategy, start = make(model(hidden=(7, 6)), share=share), {}
    found, begin, tune = tuned(strategy), strategy.begin, strategy._tune

    def beginning(experience):
        begin(experience)
        start.update(weights(strategy))

    def left_over():
        for p in strategy.model.parameters():
            p.grad = torch.ones_like(p)
        tune()

    strategy.begin, strategy._tune = beginning, left_over
    drive(strategy, experiences(1), epochs=1)
    ((_, before, after),) = found
    change = {n: (before[n] - start[n]).abs().double().mean().item() for n in before}
    most = sorted(change, key=change.get)[-math.ceil(share * 6) :]
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(most)
    assert all(p.requires_grad for p in strategy.model.parameters())


def test_a_pass_by_hand(linear, drive, experiences):
    """Plain steps on what is drawn of the memory, the rate falling by a cosine; with the logits that were stored."""
    strategy = make(linear(), share=1.0, logit_weight=0.3, momentum=0.5, tune_steps=3, at_end=False).double()
    strategy.begin(Experience(0, "a", Kind.LEARN, None, classes=(0, 1)))
    x, y = torch.tensor([[1.0, 2.0], [-1.0, 0.5], [0.3, 0.1]], dtype=torch.float64), torch.tensor([0, 1, 1])
    strategy.raw = x
    strategy.training_step((x, y), 0)
    stored = strategy.memory.stored["logits"][:3]
    assert torch.equal(stored, strategy.model(x).detach())
    other = linear().double()
    step = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.5)
    generator = torch.Generator()
    generator.set_state(strategy.memory.generator.get_state())
    strategy._tune()
    for k in range(3):
        drawn = torch.randint(3, (4,), generator=generator)
        logits = other(x[drawn])
        loss = F.cross_entropy(logits, y[drawn]) + 0.3 * (logits - stored[drawn]).square().mean()
        step.param_groups[0]["lr"] = 0.05 * (1 + math.cos(math.pi * k / 3)) / 2
        step.zero_grad()
        loss.backward()
        step.step()
    for one, two in zip(strategy.model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(one, two)
        assert one.grad is None


def test_passes_come_at_equal_distances_over_all_experiences(experiences, model, drive):
    stream = experiences(2)  # of 24 samples: 2 · 2 · 3 steps
    strategy = make(model(), replay_batch=0, every=4, at_end=False)
    found = tuned(strategy)
    drive(strategy, stream)
    assert [step for step, _, _ in found] == [4, 8, 12]
    both = make(model(), every=4)
    found = tuned(both)
    drive(both, stream)
    assert [step for step, _, _ in found] == [4, 6, 8, 12, 12]


def test_of_the_memory_a_stream_step_has_nothing_where_none_is_replayed(experiences, model, drive, equal):
    stream, plain = experiences(), model()
    strategy = make(model(), replay_batch=0, at_end=False)
    drive(strategy, stream, epochs=1)
    drive(Naive(model=plain, lr=0.05), stream, epochs=1)
    assert equal(strategy.model, plain)  # k = 0
    assert strategy.memory.seen == sum(len(e.train) for e in stream)


def test_without_steps_in_a_pass_it_is_er(experiences, model, drive, equal):
    nets = [model(), model()]
    torch.manual_seed(5)
    strategy = drive(make(nets[0], tune_steps=0, every=2), experiences())
    assert "logits" not in strategy.memory.stored
    torch.manual_seed(5)
    drive(ER(model=nets[1], memory=9, replay_batch=4, lr=0.05), experiences())
    assert equal(*nets)


def test_running_statistics_stay_in_a_pass_and_logits_are_those_of_evaluation(experiences, drive):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5))
    strategy = make(Classifier(Wrapped(net, (5,)), Growing(7, 6)), at_end=False, logit_weight=1.0)
    (e,) = experiences(1)
    strategy.grow(e)
    strategy.begin(e)
    x, y = e.train.all()
    strategy.raw = x
    with torch.no_grad():
        expected = strategy.eval().model(x)
    strategy.train()
    strategy.memory.size = len(x)
    strategy.training_step((x, y), 0)
    assert torch.equal(strategy.memory.stored["logits"], expected)
    before = {n: b.clone() for n, b in net.named_buffers()}
    strategy._tune()
    assert all(torch.equal(b, before[n]) for n, b in net.named_buffers())
    assert net.training


def test_resumes(experiences, model, resumes):
    for options in ({}, {"every": 4, "replay_batch": 0, "logit_weight": 0.5}):
        assert resumes(lambda options=options: make(model(), **options), experiences())


def test_with_all_frozen_there_is_nothing_to_tune(experiences, model):
    net, (e,) = model(), experiences(1)
    net.grow(e)
    strategy = make(net.requires_grad_(False))
    strategy.grow(e)
    strategy.begin(e)
    strategy.end(e)


def test_refuses_what_it_cannot_do(model):
    wrong = {"replay_batch": -1, "share": 0, "every": 0, "tune_steps": -1, "tune_batch": 0, "logit_weight": -1}
    for option, value in wrong.items():
        with pytest.raises(UserError, match=rf"strategy.{option}: {value} is out of range"):
            make(model(), **{option: value})
    free = [Experience(0, "a", Kind.LEARN, None)]
    (said,) = make(model(), logit_weight=0.5).faults(free, False)
    assert "strategy.logit_weight: 0.5, but free text has no logits" in said
    assert make(model()).faults(free, False) == []
