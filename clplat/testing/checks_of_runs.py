"""Checks of what a strategy does in a run: what may move, what must, what it may see, and that it can be repeated."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from typing import Any

import psutil
import torch
from torch import Tensor, nn

from clplat.components.state import rng_state
from clplat.config import discovery
from clplat.run.evaluation import Evaluator
from clplat.strategy import Strategy, check_hooks, evaluating
from clplat.stream import Experience, Kind
from clplat.testing.result import NotApplicable, expect, listed
from clplat.testing.source import argument_faults
from clplat.testing.subject import BATCH, SEED, State, Subject, measured

TOLERANCE = 1e-5
MOVED = 1e-5  # a smaller difference could be the order of a sum


def hooks(subject: Subject) -> None:
    """The hooks that are written are those of the kinds declared; kinds and paper are there."""
    faults = check_hooks(subject.cls)
    if not getattr(subject.cls, "paper", "").strip():
        faults.append(f"{subject.cls.__name__}.paper: is empty")
    expect(not faults, "; ".join(faults))


def arguments(subject: Subject) -> None:
    """No argument is ignored, each is documented, and one that does not exist is refused."""
    faults = argument_faults(subject.cls)
    expect(not faults, "; ".join(faults))
    discovery.options(subject.entry)
    stream = subject.stream()
    try:
        subject.build(stream, **subject.options(), no_such_argument=1)
    except TypeError:
        return
    expect(False, "an argument that does not exist is accepted: pass **base on to Strategy, which refuses it")


def frozen_parameters(subject: Subject) -> None:
    """Parameters that the user froze keep their bits, and so do the tensors of the stream."""
    wrong = _moved_though_frozen(subject, lambda backbone: list(backbone.parameters())[:2])
    expect(not wrong, f"moved although requires_grad was False: {listed(wrong)}")
    used, fresh = subject.straight.stream, subject.stream(seed=SEED)
    same = [torch.equal(a, b) for a, b in zip(used.tensors(), fresh.tensors(), strict=True)]
    expect(all(same), "the stream's tensors were changed in place: copy inputs before writing to them")


def frozen_backbone(subject: Subject) -> None:
    """A backbone that the user froze whole keeps its bits; where `frozen_features` is declared, so do the features."""
    wrong = _moved_though_frozen(subject, lambda backbone: list(backbone.parameters()))
    expect(not wrong, f"moved although the backbone was frozen: {listed(wrong)}")
    if subject.cls.frozen_features:
        strategy, fresh = subject.straight.strategy, subject.build(subject.stream())
        probe = subject.straight.stream.probe
        with torch.no_grad(), evaluating(strategy), evaluating(fresh):
            features, before = (s.model.features(probe) for s in (strategy, fresh))  # type: ignore[operator]
            same = torch.allclose(strategy.readout(features), strategy.predict(probe), atol=TOLERANCE, rtol=TOLERANCE)
        expect(torch.equal(features, before), "it declares frozen_features, but features changed in the run")
        expect(same, "readout of the features is not what predict gives: evaluation scores readout")


def _moved_though_frozen(subject: Subject, choose: Any) -> list[str]:
    held: dict[str, tuple[nn.Parameter, Tensor]] = {}

    def freeze(backbone: nn.Module) -> list[nn.Parameter]:
        names = {id(p): name for name, p in backbone.named_parameters()}
        held.update({names[id(p)]: (p, p.detach().clone()) for p in choose(backbone)})
        return [p for p, _ in held.values()]

    after = dict(subject.run(freeze=freeze).strategy.model.named_parameters())
    # By object, which wrapping a layer keeps, and by name, which replacing a parameter keeps.
    wrong = [name for name, (p, before) in held.items() if not torch.equal(p, before)]
    for name, (_, before) in held.items():
        now = after.get(f"backbone.{name}")
        if name not in wrong and now is not None and not torch.equal(now, before):
            wrong.append(name)
    return wrong


def mechanism(subject: Subject) -> None:
    """A run changes the learner, and not as plain fine-tuning with the same draws does."""
    mine = subject.run(reseed=True)
    stream, untouched = mine.stream, subject.build(subject.stream())
    for experience in stream:
        torch.manual_seed(1000 + experience.index)
        untouched.grow(experience.seen())
    expect(bool(mine.state.differences(State.of(untouched))), "after the stream its state is what growing alone gives")
    if subject.entry.name in ("naive", "source"):
        raise NotApplicable("it is fine-tuning")
    plain = subject.fine_tuned()
    probe, other = stream.probe, plain.strategy
    same = _all_near(_weights(mine.strategy), _weights(other))
    same &= _near(subject.answers(mine.strategy, probe), subject.answers(other, probe))
    expect(not same, "it ends where plain fine-tuning ends, in weights and predictions: its mechanism does nothing")


def erasure(subject: Subject) -> None:
    """Every request changes what is answered for the samples to erase; a class erased gets less probability.

    One that is less probable than by chance, since later ones took its place, may come back that far.
    """
    if Kind.FORGET not in subject.cls.kinds:
        raise NotApplicable("it is not asked to forget")
    stream, wrong = subject.stream(), list[str]()
    trial = subject.trial(subject.build(stream), stream)
    train = trial._train

    def watched(experience: Experience) -> None:
        if experience.kind is not Kind.FORGET or experience.train is None:
            return train(experience)
        inputs, labels = experience.train.all()[0], experience.train.targets()[:, None]
        before = subject.answers(trial.strategy, inputs)
        train(experience)
        after = subject.answers(trial.strategy, inputs)
        if _near(before, after):
            wrong.append(f"{experience.name} changes no answer for the samples to erase: forget_step does nothing")
        elif experience.classes:
            was, now = (a.softmax(1).gather(1, labels).mean().item() for a in (before, after))
            chance = 1 / (before > -torch.inf).sum(1).float().mean().item()
            if now >= max(was, chance):
                wrong.append(f"{experience.name} raises the probability of the class to erase, from {was} to {now}")
        return None

    trial._train = watched  # type: ignore[method-assign]
    subject.finish(trial)
    expect(not wrong, "; ".join(wrong))


def _weights(strategy: Strategy) -> dict[str, Tensor]:
    return {k: v for k, v in strategy.model.state_dict().items() if isinstance(v, Tensor)}


def _all_near(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(name in a and _near(a[name], b[name]) for name in b)


def _near(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a.float(), b.float(), atol=MOVED, rtol=MOVED, equal_nan=True)


def task_free(subject: Subject) -> None:
    """Predictions get no task, do not depend on the rest of the batch, and leave state and random states alone."""
    strategy, stream = subject.straight.strategy, subject.straight.stream
    tasks: list[Any] = []

    def spy(inner: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def called(inputs: Tensor, task: int | None = None) -> Tensor:
            tasks.append(task)
            return inner(inputs, task)

        return called

    before, rng = State.of(strategy), State.copy(rng_state())
    spies = {name: spy(getattr(strategy, name)) for name in ("predict", "readout")}
    strategy.__dict__.update(spies)
    try:
        Evaluator(stream, device=torch.device("cpu"), batch_size=BATCH)(strategy)
    finally:
        for name in spies:
            del strategy.__dict__[name]
    whole = subject.answers(strategy, stream.probe)
    changed = before.differences(State.of(strategy))
    expect(not changed, f"predicting changes its state: {listed(changed)}")
    drawn = rng.differences(State.copy(rng_state()))
    expect(not drawn, "predicting draws random numbers from a global generator")
    expect(all(task is None for task in tasks), "predict was given a task that the stream does not declare known")
    order = torch.randperm(len(stream.probe), generator=torch.Generator().manual_seed(5))
    parts = torch.cat([subject.answers(strategy, stream.probe[rows]) for rows in order.split(7)])
    scale = max([1.0, *whole[whole.isfinite()].abs().tolist()])
    if not torch.allclose(parts, whole[order], atol=TOLERANCE * scale, rtol=TOLERANCE):
        expect(
            strategy.evaluation_batch is not None,
            "a sample's prediction depends on the other samples of its batch, and no evaluation_batch says on how many",
        )
        raise NotApplicable("it adapts to the batch that it predicts")


def test_data(subject: Subject) -> None:
    """Neither test data, nor other experiences, nor the labels of what is adapted to reach a hook."""
    outcome = subject.straight
    peeks = sorted(set(outcome.stream.peeks))
    expect(not peeks, f"a hook asks for experience.{', experience.'.join(peeks)}, which is not for strategies")
    # The same training data, but in tensors that hold nothing else, and noise for test sets.
    other = subject.run(separate=True)
    wrong = outcome.state.differences(other.state)
    expect(not wrong, f"it uses data of another experience, or of a test set: without them {listed(wrong)} differ")


def unlabelled(subject: Subject) -> None:
    """Labels of what is adapted to score predictions and change nothing else."""
    if Kind.ADAPT not in subject.cls.kinds:
        raise NotApplicable("it does not adapt")
    straight, other = subject.straight, subject.run(mislabel=True)
    wrong = straight.state.differences(other.state)
    expect(not wrong, f"with wrong labels {listed(wrong)} differ")
    expect(straight.record.online != other.record.online, "wrong labels score as right ones do")


def seed(subject: Subject) -> None:
    """The same seed gives the same numbers, and another seed others."""
    first, again, other = subject.straight, subject.run(), subject.run(seed=SEED + 1)
    wrong = first.state.differences(again.state)
    expect(not wrong, f"the same seed ends elsewhere: {listed(wrong)} (draw from torch, or from a seeded generator)")
    mine, theirs = measured(first.record), measured(again.record)
    wrong = [key for key in mine if mine[key] != theirs[key]]
    expect(not wrong, f"the same seed measures something else: {listed(wrong)}")
    expect(bool(first.state.differences(other.state)), "another seed ends in the same state")


def leaks(subject: Subject) -> None:
    """A run leaves no thread, open file, environment variable or global setting behind."""
    _ = subject.straight  # what is imported or opened once for good has been by now
    before = _surroundings()
    subject.run()
    after = _surroundings()
    wrong = [f"{name}: {before[name]} became {after[name]}" for name in before if before[name] != after[name]]
    expect(not wrong, "left behind: " + "; ".join(wrong))


def _surroundings() -> dict[str, Any]:
    gc.collect()
    process = psutil.Process()
    return {
        "threads": sorted(t.name for t in threading.enumerate()),
        "environment": dict(os.environ),
        "open files": sorted(f.path for f in process.open_files()),
        "working directory": os.getcwd(),
        "torch's threads": torch.get_num_threads(),
        "torch's default type": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }
