"""What is measured: losses as they are read, test sets between and after experiences, health and cost."""

from __future__ import annotations

import time

import torch
from torch import Tensor

from clplat.data.transitions import unpack
from clplat.errors import DivergedError
from clplat.metrics import cost as costs
from clplat.metrics import per_experience
from clplat.metrics.representation import measure
from clplat.run import online, predictions
from clplat.run.evaluation import Evaluator
from clplat.run.interaction import everywhere
from clplat.run.state import RunState
from clplat.strategy import Strategy
from clplat.stream import Actions, Experience, Kind, Stream

_SAMPLES = 512


def evaluate(run: RunState, asked: range | None = None, evaluator: Evaluator | None = None) -> list[float | None]:
    """Scores on the test sets `asked`, all for None, by the run's evaluator or another.

    Raises:
        Stopped: the one process that there is was asked to stop. Between steps a stop waits for the evaluation, which
            could not be made up for.
        DivergedError: outputs are not finite; says when.
    """
    started = time.perf_counter()
    try:
        with run.fabric.autocast():
            inside = evaluator is run.evaluate_inside or run.world_size > 1

            def leave_off(done: int, total: int) -> bool:
                run.log.scoring(done, total)
                return run.stop_requested and not inside

            scores = (evaluator or run.evaluate)(run.strategy, asked, leave_off)
    except DivergedError as error:
        flush(run)  # a loss not yet read comes first
        raise _diverged(run, str(error)) from error
    run.spent["eval_seconds"] += time.perf_counter() - started
    return scores


def row(run: RunState, finished: int) -> list[float | None]:
    """The row of the accuracy matrix after `finished` experiences, of the test sets that `loop.evaluate` names."""
    at_end = finished == min(len(run.stream), run.loop.stop_after or len(run.stream))
    request = not at_end and run.stream[finished].kind is Kind.FORGET  # of samples met already: what it starts from
    met = range(finished + request)
    asked = {"all": None, "seen": met, "last": met if at_end else range(max(finished - 1, 0), met.stop)}[
        run.loop.evaluate
    ]
    return evaluate(run, asked)


def _diverged(run: RunState, what: str, step: int | None = None) -> DivergedError:
    """The error that says what is not finite, where the run stands, and what to do."""
    p = run.progress
    where = f"experience {p.experience} ({run.stream[p.experience].name})"
    if not p.begun:
        return DivergedError(f"{what} before {where}: look at the weights that the run starts from")
    advice = "try a smaller strategy.lr, or set loop.clip_norm"
    head = getattr(run.strategy.model, "head", None)
    if p.experience and hasattr(head, "tasks_of"):  # gives -inf outside the task that it is told
        advice = (
            f"head: taskwise scores a batch by the current task alone: if {type(run.strategy).__name__} mixes samples "
            "of other tasks into it, let it take self.losses(x, y), or self.model(x, tasks_of(self.model, y)) of "
            f"clplat.strategy, or set another head; if not, {advice}"
        )
    where += f" at step {p.steps if step is None else step}"
    return DivergedError(f"{what} in {where}; the last good checkpoint is kept ({advice})")


def evaluate_inside(run: RunState, experience: Experience) -> None:
    """Evaluation between steps, for anytime accuracy and the stability gap."""
    asked = None if run.loop.evaluate == "all" else range(experience.index + 1)
    p, scores = run.progress, evaluate(run, asked, run.evaluate_inside)
    run.record.anytime.append({"step": p.total_steps, "experience": experience.index, "scores": scores})
    seen = [s for s in scores[: experience.index + 1] if s is not None]
    named = {f"anytime/{run.stream[j].name}": s for j, s in enumerate(scores) if s is not None}
    if named:
        run.log.step(p.total_steps, named | ({"anytime/accuracy": sum(seen) / len(seen)} if seen else {}))


def flush(run: RunState) -> None:
    """Read losses from the device, refuse those that are not finite, log their mean."""
    values = check(run)
    metrics = online.running_error(run.record.online, run.online)
    run.losses = []
    if values is not None:
        metrics["train/loss"] = values.mean().item()
        if run.optimizer is not None:
            metrics["train/lr"] = run.optimizer.param_groups[0]["lr"]
        if run.gradient_norms:
            metrics["train/gradient_norm"] = run.gradient_norms[-1]
    if metrics:
        run.log.step(run.progress.total_steps, metrics)


def check(run: RunState) -> Tensor | None:
    """Losses not logged yet (n,), read from the device; None where there are none.

    Raises:
        DivergedError: a loss was not finite, on any process.
    """
    if run.broken:
        broken, run.broken = torch.stack(run.broken).sum().double(), []
        if run.world_size > 1:
            torch.distributed.all_reduce(broken)
        if broken:
            raise _diverged(run, f"predictions are NaN or infinite for {int(broken)} samples")
    if not run.losses:
        return None
    values = torch.stack(run.losses).float().cpu()
    finite = values.isfinite()
    if run.world_size > 1:  # all processes must stop together
        torch.distributed.all_reduce(every := finite.int(), torch.distributed.ReduceOp.MIN)
        finite = every.bool()
    if not finite.all():
        first = int(finite.int().argmin())
        step = run.progress.steps - (len(values) - first) // run.window + 1
        raise _diverged(run, f"loss is {values[first].item()}", step)
    return values


def measure_experience(run: RunState, experience: Experience) -> dict[str, float]:
    """Take what an experience has left into the record; what is to be logged of it."""
    record, norms = run.record, run.gradient_norms
    record.matrix.append(row(run, experience.index + 1))
    if experience.kind is Kind.ADAPT:
        predictions.write(run, experience)
        record.online.append({"experience": experience.index, **run.all_processes(run.online)})
    if experience.kind is Kind.INTERACT:
        record.returns.append(run.returns | everywhere(run))
    loop = run.loop
    found = health(run.strategy, run.stream, experience) if loop.representation else {}
    if loop.diagnostics:
        found |= run.diagnostics.measure(run.strategy, held_out(run.strategy, run.stream, experience))
    record.representation.append(found | {"gradient_norm": sum(norms) / len(norms) if norms else None})
    record.cost |= cost(run.strategy, run.fabric.device, run.spent, run.world_size)
    spent = {f"cost/{k}": v for k, v in record.cost.items() if v is not None}
    merged = {f"merge/{k}": v for k, v in run.merging.measurements().items()} if run.merging is not None else {}
    own = {f"strategy/{k}": v for k, v in run.strategy.measurements().items()}
    return per_experience(record, run.rows) | spent | own | merged


def health(strategy: Strategy, stream: Stream, experience: Experience) -> dict[str, float | None]:
    """Dormant units, effective rank and weight norm, on `held_out` inputs."""
    inputs = held_out(strategy, stream, experience)
    if inputs is None:
        return dict.fromkeys(("dormant_fraction", "effective_rank", "weight_norm"))
    return measure(strategy.model, inputs)


def held_out(strategy: Strategy, stream: Stream, experience: Experience) -> Tensor | None:
    """At most 512 prepared inputs (n, ...) of an experience, held-out ones if there are any."""
    data = next((d for d in (experience.test, experience.valid, experience.train) if d is not None and len(d)), None)
    if data is None:
        return None
    device = next(strategy.parameters()).device
    positions = torch.linspace(0, len(data) - 1, min(_SAMPLES, len(data)), device=data.inputs.device).long()
    raw, _ = data.batch(positions)
    if experience.kind is Kind.INTERACT and isinstance(stream.answers, Actions):
        raw = unpack(raw, stream.answers.size).observation
    return stream.prepare(raw.to(device), False)


def cost(
    strategy: Strategy, device: torch.device, spent: dict[str, float], world_size: int
) -> dict[str, float | int | None]:
    """Cost of the run so far, under the names of the summary.

    Args:
        spent: train_seconds, eval_seconds, save_seconds, train_flops of one process, samples of all.
    """
    seconds = spent["train_seconds"]
    return {
        "train_seconds": seconds,
        "eval_seconds": spent["eval_seconds"],
        "save_seconds": spent["save_seconds"],
        "samples_per_second": spent["samples"] / seconds if seconds else None,
        "peak_rss_bytes": costs.peak_rss_bytes(),
        "peak_device_bytes": costs.peak_device_bytes(device),
        "trainable_parameters": costs.trainable_parameters(strategy),
        "stored_bytes": costs.stored_bytes(strategy),
        "train_flops": spent["train_flops"] * world_size,
    }
