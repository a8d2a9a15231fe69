"""A turn for each kind: what happens between two gradient steps.

    learn, forget   a batch → its loss
    adapt           a batch → predictions, scored → a loss, or None
    interact        its offline data as `learn` does; then act, store, and train as often as `observe` asks

A turn is a generator of losses; None is a turn that takes no gradient step.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from clplat.components.memory import Bounded
from clplat.data.batches import batches_per_epoch, epoch_order, local_slice
from clplat.errors import UserError
from clplat.run import online
from clplat.run.evaluation import not_finite
from clplat.run.interaction import play
from clplat.run.predictions import keep
from clplat.run.state import RunState
from clplat.run.step import gradient_steps, place
from clplat.stream import Data, Experience, Kind


def turns(run: RunState, experience: Experience, seen: Experience) -> Iterator[Tensor | None]:
    """All turns of an experience, from where progress stands; `seen` is what the strategy may see of it."""
    match experience.kind:
        case Kind.LEARN:
            yield from supervised(run, experience, run.strategy.training_data(seen), "training_step")
        case Kind.FORGET:
            yield from supervised(run, experience, run.strategy.training_data(seen), "forget_step")
        case Kind.ADAPT:
            yield from adapt(run, experience)
        case Kind.INTERACT:
            if seen.train is not None:
                yield from supervised(run, experience, run.strategy.training_data(seen), "training_step")
            if experience.environment is not None:
                yield from play(run, experience)


def supervised(run: RunState, experience: Experience, data: Data, hook: str) -> Iterator[Tensor | None]:
    """Epochs of shuffled batches, each handed to `hook`. Only the first offers its samples to the memories."""
    p, loop, step = run.progress, run.loop, run.hook(hook)
    batches, size = batches_per_epoch(len(data), loop.batch_size, run.world_size), loop.batch_size * run.world_size
    memories = [m for m in run.strategy.modules() if isinstance(m, Bounded)]
    run.steps_planned = gradient_steps(run, len(data), experience.kind)
    while p.epoch < loop.epochs(experience.kind) and not run.enough():
        for memory in memories:
            memory.open = p.epoch == 0
        order = epoch_order(len(data), run.seed, p.experience, p.epoch, data.inputs.device)
        order = run.stream.arrange(data, order, size)
        coming = run.ahead(data, order, batches)
        while p.batch < batches and not run.enough():
            raw, labels = run.batch(coming)
            first = p.batch // loop.accumulate * loop.accumulate
            run.window = min(loop.accumulate, batches - first)
            run.boundary = p.batch + 1 == first + run.window
            run.share = run.strategy.global_batch / (min(len(data), (first + run.window) * size) - first * size)
            yield step((run.strategy.prepare(raw), labels), p.batch)
        p.epoch, p.batch = p.epoch + 1, 0
    for memory in memories:
        memory.open = True


def adapt(run: RunState, experience: Experience) -> Iterator[Tensor | None]:
    """Predictions are made and scored by labels that the strategy never holds, then the loss is stepped on."""
    data, p, step = experience.train, run.progress, run.hook("adapt_step")
    assert data is not None
    order = torch.arange(len(data), device=data.inputs.device)
    run.window, run.share, run.boundary = 1, 1.0, True
    batches = batches_per_epoch(len(data), run.loop.batch_size, run.world_size)
    coming = run.ahead(data, order, batches)
    for _ in range(p.batch, batches):
        raw, labels = run.batch(coming)
        out = step(run.stream.prepare(raw, False))
        predictions, loss = out if isinstance(out, tuple) else (out, None)
        if not isinstance(predictions, Tensor):
            what = f"gives a {type(predictions).__name__} (valid: a tensor of predictions, or (predictions, loss))"
            raise UserError(f"strategy: {place(run, 'adapt_step')} {what}")
        run.broken.append(not_finite(predictions))
        if run.loop.keep_predictions:
            part, _ = local_slice(len(data), p.batch, run.loop.batch_size, run.rank, run.world_size)
            keep(run, order[part], predictions, labels)
        if labels is not None:
            scores = run.stream.score(predictions.detach(), labels)
            online.count(run.online, data, run.strategy.rows, scores)
        yield loss
