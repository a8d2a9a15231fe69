"""All of a run's state as tensors and plain values, and back."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch

from clplat.erasure import late
from clplat.metrics.record import RunRecord
from clplat.run import checkpoint
from clplat.stream import Actions, Stream

if TYPE_CHECKING:
    from clplat.run.runner import Runner

# Plain attributes of the runner that a resumed run needs as they were.
_PLAIN = ("spent", "returns", "gradient_norms", "flops_per_step", "saves")


def snapshot(runner: Runner) -> dict[str, Any]:
    """State of a run between two steps; collective under DDP: random states and online scores differ by process."""
    strategy, own = runner.strategy, {"rng": checkpoint.rng_state(), "online": runner.online}
    strategy.on_save_checkpoint({})  # what processes hold apart is brought together on process 0
    processes: list[Any] = [own]
    if runner.world_size > 1:
        processes = [None] * runner.world_size
        torch.distributed.all_gather_object(processes, own)
    resumed = None
    p = runner.progress
    needed = (p.begun and not p.trained) or runner.carried(p.experience + p.trained)
    if needed and runner.optimizer is not None:
        resumed = {"optimizer": runner.optimizer.state_dict(), "learning_rates": runner.base_lrs}
    return {
        "progress": asdict(runner.progress),
        "strategy": dict(strategy.state_dict()),
        "evaluating": [n for n, m in strategy.named_modules() if not m.training],
        "frozen": [n for n, p in strategy.named_parameters() if not p.requires_grad],
        "resumed": resumed,
        "processes": processes,
        "stream": facts(runner.stream),
        "record": runner.record.to_dict(),
        "metrics_offset": runner.log.offset(),
        **{name: getattr(runner, name) for name in _PLAIN},
    }


def restore(runner: Runner, state: dict[str, Any]) -> None:
    """Inverse of `snapshot`: replay `grow` for the structure, load everything, random states last."""
    progress, strategy = runner.progress, runner.strategy
    progress.__dict__.update(state["progress"])
    strategy.train()
    for experience in runner.stream.experiences[: progress.experience + progress.begun]:
        strategy.grow(experience.seen())
    strategy.to(runner.fabric.device)
    strategy.load_state_dict(state["strategy"])
    evaluating, frozen = set(state["evaluating"]), set(state["frozen"])
    for name, module in strategy.named_modules():
        module.training = name not in evaluating
    for name, parameter in strategy.named_parameters():
        parameter.requires_grad_(name not in frozen)
    known = runner.record.experiences
    runner.record.__dict__.update(RunRecord.from_dict(state["record"]).__dict__)
    for name in _PLAIN:
        setattr(runner, name, state[name])
    runner.resumed = state["resumed"]
    late.measure(runner, known)
    own = state["processes"][runner.rank]
    runner.online = own["online"]
    checkpoint.set_rng_state(own["rng"])


def facts(stream: Stream) -> dict[str, Any]:
    """What building the model needs of a stream, so that a run can be loaded without its data."""
    return {
        "num_classes": stream.num_classes,
        "input_shape": list(stream.input_shape),
        "names": list(stream.class_names),
        "actions": stream.answers.size if isinstance(stream.answers, Actions) else None,
    }
