"""All of a run's state as tensors and plain values, and back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clplat.backbones._weights import files_read
from clplat.components.shards import whole
from clplat.components.state import flatten, rng_state, set_rng_state
from clplat.errors import UserError
from clplat.metrics.record import ExperienceRecord, RunRecord
from clplat.run import checkpoint, filing
from clplat.run.elastic import inherited
from clplat.run.measuring import evaluate
from clplat.run.predictions import held
from clplat.run.sharding import parted_state
from clplat.run.sources import Sources
from clplat.run.state import RunState
from clplat.run.step import carried
from clplat.strategy import Strategy
from clplat.stream import Actions, Stream

SHARE = 0.02  # of the time at most, that checkpoints written by time may cost
# Plain attributes of a run that a resumed run needs as they were.
_PLAIN = ("spent", "returns", "gradient_norms", "flops_per_step", "saves")


def snapshot(run: RunState) -> dict[str, Any]:
    """State of a run between two steps; collective under DDP: random states and online scores differ by process."""
    strategy, own = run.strategy, dict[str, Any](rng=rng_state(), online=run.online)
    own |= {"losses": unread(run), "predictions": held(run)}
    strategy.on_save_checkpoint({})  # what processes hold apart is brought together on process 0
    processes: list[Any] = [own]
    if run.world_size > 1:
        processes = [None] * run.world_size
        torch.distributed.all_gather_object(processes, own)
    resumed = None
    p = run.progress
    needed = (p.begun and not p.trained) or carried(run, p.experience + p.trained)
    if needed and run.optimizer is not None:
        resumed = {"optimizer": run.optimizer.state_dict(), "learning_rates": run.base_lrs}
    weights = dict(strategy.state_dict(keep_vars=run.sharded))
    if run.sharded and not run.loop.checkpoint_sharded:
        weights, resumed = whole([weights, resumed], keep=run.rank == 0)
    return {
        "progress": asdict(run.progress),
        "strategy": weights,
        "evaluating": [n for n, m in strategy.named_modules() if not m.training],
        "frozen": [n for n, p in strategy.named_parameters() if not p.requires_grad],
        "resumed": resumed,
        "merge": run.merge.state(),
        "diagnostics": run.diagnostics.state(),
        "acting": None if run.acting is None else run.acting.state(),
        "processes": processes,
        "stream": facts(run.stream),
        "record": run.record.to_dict(),
        "metrics_offset": run.log.offset(),
        "metrics_sha256": run.log.sha256(),
        "config": run.config,
        **{name: getattr(run, name) for name in _PLAIN},
    }


def restore(run: RunState, state: dict[str, Any]) -> None:
    """Inverse of `snapshot`: replay `grow` for the structure, load everything, random states last.

    Raises:
        UserError: the state is not one of such a run, though it is whole: forged, or of another version.
    """
    try:
        _restore(run, state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"resume: the checkpoint does not fit this run ({type(error).__name__}: {text})") from error


def _restore(run: RunState, state: dict[str, Any]) -> None:
    progress, strategy = run.progress, run.strategy
    progress.__dict__.update(state["progress"])
    strategy.train()
    for experience in run.stream.experiences[: progress.experience + progress.begun]:
        strategy.grow(experience.seen())
    strategy.to(run.fabric.device)
    strategy.load_state_dict(parted_state(state["strategy"], strategy) if run.sharded else state["strategy"])
    for name, part in (("merge", run.merge), ("diagnostics", run.diagnostics)):
        if state.get(name):
            part.load(_moved(state[name], run.fabric.device))
    evaluating, frozen = set(state["evaluating"]), set(state["frozen"])
    for name, module in strategy.named_modules():
        module.training = name not in evaluating
    for name, parameter in strategy.named_parameters():
        parameter.requires_grad_(name not in frozen)
    known = run.record.experiences
    run.record.__dict__.update(RunRecord.from_dict(state["record"]).__dict__)
    spent = run.spent
    for name in _PLAIN:
        setattr(run, name, state[name])
    run.spent, run.saves = spent | run.spent, run.saves + 1  # the checkpoint read stays until the next is whole
    run.resumed, run.acted, run.saved_step = state["resumed"], state.get("acting"), progress.steps
    _add_late_columns(run, known)
    processes, world = state["processes"], run.world_size
    if len(processes) != world:  # FLOPs are counted by process
        run.spent["train_flops"] *= len(processes) / world
        run.flops_per_step *= len(processes) / world
    own = inherited(processes, run.rank, world)
    run.online, run.predictions = own["online"], own["predictions"]
    run.losses = [loss.to(run.fabric.device) for loss in own["losses"]]
    set_rng_state(own["rng"])


def _moved(state: Any, device: torch.device) -> Any:
    """Nested dicts with their tensors on `device`."""
    if isinstance(state, dict):
        return {name: _moved(value, device) for name, value in state.items()}
    return state.to(device) if isinstance(state, Tensor) else state


def save(run: RunState) -> None:
    """Take a checkpoint, which process 0 writes while the run goes on; a collective call under DDP.

    An interval in steps is kept to the step: where there is one, checkpoints are waited for.

    Raises:
        UserError: it, or the one before, could not be written.
    """
    started = time.perf_counter()
    run.writer.wait()  # before anything is copied: two of them are never held at once
    state = snapshot(run)  # in which processes wait for each other, and so for the checkpoint before
    filing.checkpointed(run.strategy)
    if run.sharded and run.loop.checkpoint_sharded:
        _save_parts(run, state)
    elif run.rank == 0 and run.log.run_dir is not None:
        taken = checkpoint.take(state, run.sources)
        run.writer.start(partial(checkpoint.write, run.log.run_dir / "checkpoints", run.saves, taken))
        if run.loop.checkpoint_every:
            run.writer.wait()
    run.saves, run.saved_at, run.saved_step = run.saves + 1, time.monotonic(), run.progress.steps
    run.save_seconds = time.perf_counter() - started
    run.spent["save_seconds"] += run.save_seconds


def _save_parts(run: RunState, state: dict[str, Any]) -> None:
    """Write a checkpoint of which each process writes its part; a collective call.

    Raises:
        UserError: a process could not write; on all of them.
    """
    taken = checkpoint.take(state, run.sources)

    def parts(folder: Path) -> list[list[str]]:
        try:
            own = checkpoint.write_own(Path(run.fabric.broadcast(str(folder))), taken, run.rank)
        except OSError as error:
            own = [str(error.strerror)]
        every: list[Any] = [None] * run.world_size
        torch.distributed.all_gather_object(every, own)
        if failed := [why for why, *digest in every if not digest]:
            raise UserError(f"output: could not write a part of a checkpoint: {failed[0]}; the run can be resumed")
        return every

    if run.rank == 0:
        assert run.log.run_dir is not None
        checkpoint.write(run.log.run_dir / "checkpoints", run.saves, taken, parts)
    else:
        parts(Path())
    run.fabric.barrier()


def known_sources(strategy: Strategy) -> Sources:
    """What checkpoints need not hold of a learner that has just been built: what it was read from says it."""
    tensors: dict[str, Tensor] = {}
    flatten(dict(strategy.state_dict()), tensors)
    return Sources(files_read(strategy), tensors.values())


def due(run: RunState) -> bool:
    """Whether a checkpoint is to be written after this step; a collective call under DDP.

    By time, one is due early enough to be whole after `loop.checkpoint_seconds`, and not before it costs at most
    `SHARE` of the time since the one before: what the last one held up the loop, and took of a processor beside it.
    """
    loop, p = run.loop, run.progress
    every, seconds = loop.checkpoint_every, loop.checkpoint_seconds
    found = bool(every and p.steps // every > run.saved_step // every)  # what was due and could not be is made up for
    if seconds:
        found |= _affordable(run, seconds - run.writer.seconds)
    return bool(run.fabric.broadcast(found)) if run.world_size > 1 and seconds else found


def worth(run: RunState) -> bool:
    """Whether a checkpoint is to be written where an experience ends; a collective call under DDP.

    It always is where none is written by time, or each of so many steps is asked for: then the places are told.
    """
    if run.loop.checkpoint_every or run.loop.checkpoint_seconds is None:
        return True
    found = _affordable(run)
    return bool(run.fabric.broadcast(found)) if run.world_size > 1 else found


def _affordable(run: RunState, least: float = 0.0) -> bool:
    """Whether the last checkpoint is written, `least` seconds ago, and another costs at most `SHARE` of the time."""
    last = run.writer
    wait = max(least, (run.save_seconds + last.processor) / SHARE)
    return not last.busy and time.monotonic() - run.saved_at >= wait


def _add_late_columns(run: RunState, facts: Sequence[ExperienceRecord]) -> None:
    """Give requests that a restored record does not know yet a column, measured in the row that they start from.

    Args:
        facts: of all experiences of the stream.
    """
    record = run.record
    for index, (before, now) in enumerate(zip(record.experiences, facts, strict=False)):
        if (before.name, before.kind) != (now.name, now.kind):
            raise UserError(f"resume: experience {index} was {before.name!r} ({before.kind}), and is {now.name!r}")
    if len(record.experiences) > len(facts):
        raise UserError(
            f"resume: the run had {len(record.experiences)} experiences, its stream has {len(facts)}: put "
            "requests.json back, or the data that the stream was made of"
        )
    if len(record.experiences) < len(facts):
        record.experiences += facts[len(record.experiences) :]
        for row in record.matrix:
            row += [None] * (len(facts) - len(row))
        record.matrix[-1] = evaluate(run)


def unread(run: RunState) -> list[Tensor]:
    """Losses of steps taken that are not logged yet."""
    return [loss.cpu() for loss in run.losses]


def facts(stream: Stream) -> dict[str, Any]:
    """What a learner needs of a stream, so that a run can be loaded, and asked, without its data."""
    return {
        "num_classes": stream.num_classes,
        "input_shape": list(stream.input_shape),
        "names": list(stream.class_names),
        "task_known": stream.task_known,
        "preprocessing": stream.preprocessing().to_dict(),
        "actions": stream.answers.size if isinstance(stream.answers, Actions) else None,
    }
