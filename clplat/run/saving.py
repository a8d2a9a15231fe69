"""All of a run's state as tensors and plain values, and back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from clplat.components.state import rng_state, set_rng_state
from clplat.errors import UserError
from clplat.metrics.record import ExperienceRecord, RunRecord
from clplat.run import checkpoint
from clplat.run.measuring import evaluate
from clplat.run.predictions import held
from clplat.run.state import RunState
from clplat.run.step import carried
from clplat.stream import Actions, Stream

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
    return {
        "progress": asdict(run.progress),
        "strategy": dict(strategy.state_dict()),
        "evaluating": [n for n, m in strategy.named_modules() if not m.training],
        "frozen": [n for n, p in strategy.named_parameters() if not p.requires_grad],
        "resumed": resumed,
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
    strategy.load_state_dict(state["strategy"])
    evaluating, frozen = set(state["evaluating"]), set(state["frozen"])
    for name, module in strategy.named_modules():
        module.training = name not in evaluating
    for name, parameter in strategy.named_parameters():
        parameter.requires_grad_(name not in frozen)
    known = run.record.experiences
    run.record.__dict__.update(RunRecord.from_dict(state["record"]).__dict__)
    for name in _PLAIN:
        setattr(run, name, state[name])
    run.resumed, run.acted, run.saved_step = state["resumed"], state.get("acting"), progress.steps
    _add_late_columns(run, known)
    own = state["processes"][run.rank]
    run.online = own["online"]
    run.losses = [loss.to(run.fabric.device) for loss in own.get("losses", ())]
    run.predictions = [own["predictions"]] if own.get("predictions") else []
    set_rng_state(own["rng"])


def save(run: RunState) -> None:
    """Write a checkpoint from process 0; a collective call under DDP."""
    state = snapshot(run)
    if run.rank == 0 and run.log.run_dir is not None:
        checkpoint.save(run.log.run_dir / "checkpoints", run.saves, state)
    run.saves, run.saved_at, run.saved_step = run.saves + 1, time.monotonic(), run.progress.steps


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
