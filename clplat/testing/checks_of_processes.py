"""Two processes with batches of B end where one process with batches of 2 B ends, short last batches included; and so
does one that goes on with what two have begun.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from clplat.components.memory import Bounded
from clplat.config import discovery
from clplat.config.settings import FabricSettings
from clplat.errors import Interrupted, UserError
from clplat.lightning import Fabric
from clplat.run import checkpoint
from clplat.run.launch import make_fabric
from clplat.strategy import HOOKS
from clplat.stream import Kind
from clplat.testing.result import CheckFailed, NotApplicable, listed
from clplat.testing.subject import SEED, State, Subject, Trial

PROCESSES, BATCH, TOLERANCE = 2, 5, 1e-5
PATIENCE = timedelta(seconds=60)  # a strategy that communicates on one process only must not hang for ever

STEP = {h for kind in Kind for h in HOOKS[kind]} | {"on_after_backward", "on_before_optimizer_step", "after_step"}


def processes(subject: Subject) -> None:
    """Two processes (gloo) end where one does that has their batches together, to 1e-5 with SGD."""
    compare(subject, _of(subject))


def fewer_processes(subject: Subject) -> None:
    """One process goes on with what two have begun (gloo), and ends where one does, to 1e-5 with SGD."""
    go_on(subject, _of(subject))


def _of(subject: Subject) -> Any:
    """What two processes end with, which both checks look at; NotApplicable where there can't be two."""
    if subject.cls.kinds == {Kind.INTERACT}:
        raise NotApplicable("an environment is not split between processes")
    if subject.cls.one_process:
        raise NotApplicable("it declares one_process")
    if "in_processes" not in subject.__dict__:
        subject.__dict__["in_processes"] = in_processes([subject.name])[subject.name]
    return subject.__dict__["in_processes"]


def in_processes(names: list[str], make: Callable[[str], Subject] = Subject) -> dict[str, Any]:
    """For each strategy what its two processes ended with, for `compare`; all in one pair of processes.

    What they and torch print meanwhile is not shown.

    Args:
        make: a subject by a strategy's name, here and in the processes.
    """
    settings = FabricSettings(accelerator="cpu", devices=PROCESSES, strategy="ddp")
    drawing = {name: drawn_by(make(name)) for name in names}
    raised: dict[str, Any] = {}
    environment = dict(os.environ)
    with tempfile.TemporaryDirectory(prefix="clplat-check-") as folder:
        try:
            fabric = make_fabric(settings)
            strategy: Any = fabric.strategy
            strategy._timeout = PATIENCE
            with _muted():
                fabric.launch(_worker, make, drawing, folder)
        except Exception as error:  # noqa: BLE001 - of one strategy, which ends the processes; start others for the rest
            raised = {"raised": str(error).strip().splitlines()[-1]}
        finally:
            for key in os.environ.keys() - environment.keys():  # the launcher leaves its port
                del os.environ[key]
        found = {name: _read(Path(folder) / str(i)) or raised for i, name in enumerate(names)}
    culprit = next((i for i, name in enumerate(names) if "raised" in found[name]), len(names))
    return found | (in_processes(names[culprit + 1 :], make) if names[culprit + 1 :] else {})


@contextmanager
def _muted() -> Iterator[None]:
    """Standard output and error lead nowhere, those of processes started meanwhile and of C++ included."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
            yield
    finally:
        for target, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, target)
            os.close(copy)


def drawn_by(subject: Subject) -> dict[str, int]:
    """Options that say how many remembered samples each process draws, with their values: found by changing them."""
    known = subject.options()
    more = [o for o in discovery.options(subject.entry) if type(o.default) is int and o.name not in known]
    if not more or subject.cls.one_process or subject.cls.kinds == {Kind.INTERACT}:
        return {}
    try:
        counts = drawn(subject)
        asked = {o.name: o.default for o in more if o.default in counts and o.default > 1}
        return {k: n for k, n in asked.items() if n - 1 in drawn(subject, **{k: n - 1}) - counts}
    except Exception:  # noqa: BLE001 - what is wrong with it is told where it is asked for
        return {}


def drawn(subject: Subject, **options: int) -> set[int]:
    """How many remembered samples a run in one process draws at once."""
    counts, names = set[int](), ("sample", "sample_distinct")
    plain = {name: getattr(Bounded, name) for name in names}

    def noting(draw: Callable[..., Any]) -> Callable[..., Any]:
        def noted(memory: Bounded, n: int) -> Any:
            counts.add(n)
            return draw(memory, n)

        return noted

    try:
        for name in names:
            setattr(Bounded, name, noting(plain[name]))
        subject.run(**(subject.options() | options))
    finally:
        for name in names:
            setattr(Bounded, name, plain[name])
    return counts


def _read(folder: Path) -> dict[str, Any] | None:
    """What both processes left in `folder`; None if one left nothing."""
    ended = [checkpoint.load_newest(folder / str(rank))[0] for rank in range(PROCESSES)]
    if None in ended:
        return None
    refused = [e["refused"] for e in ended if e and "refused" in e]
    return {"refused": refused[0]} if refused else {"states": ended}


def _worker(fabric: Fabric, *given: Any) -> None:
    make, drawing, folder = given
    torch.set_num_threads(1)
    for index, (name, counts) in enumerate(drawing.items()):
        apart = list[str]()
        try:
            with _noting(apart):
                trial = _trial(make(name), fabric, BATCH, counts)
                trial.run()
            tensors, steps = dict(State.of(trial.strategy).tensors), trial.progress.total_steps
            half = _trial(make(name), fabric, BATCH, counts, stop_at=max(1, steps // 2))
            with suppress(Interrupted):
                half.run()
            latest = half.latest or State({}, {})
            midway = {"plain": json.dumps(latest.plain), "tensors": latest.tensors}
            found = {"tensors": tensors, "apart": apart, "drawing": counts, "midway": midway}
        except UserError as error:
            found = {"refused": "; ".join(error.faults)}
        checkpoint.save(Path(folder) / str(index) / str(fabric.global_rank), 0, found)


@contextmanager
def _noting(apart: list[str]) -> Iterator[None]:
    """Notes in `apart` where a step takes gradients of parameters that it does not reduce over the processes."""
    pending = list[str]()
    distributed: Any = torch.distributed
    owners = {(torch.autograd, "grad"), (torch.Tensor, "backward"), (distributed, "all_reduce")}
    plain = {(owner, name): getattr(owner, name) for owner, name in owners}

    def replaced(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*args: Any, **options: Any) -> Any:
            caller = sys._getframe(1)
            file = caller.f_code.co_filename
            if name == "all_reduce":
                pending.clear()
            elif _in_a_step(caller) and (name == "backward" or _of_parameters(*args, **options)):
                apart.extend(pending)
                pending[:] = [f"{file}, line {caller.f_lineno}"]
            return call(*args, **options)

        return noted

    try:
        for (owner, name), call in plain.items():
            setattr(owner, name, replaced(name, call))
        yield
    finally:
        for (owner, name), call in plain.items():
            setattr(owner, name, call)
        apart[:] = sorted({*apart, *pending})


def _in_a_step(frame: Any) -> bool:
    """Whether the code of a hook of each step calls; what `begin` and `end` do, every process does whole."""
    if "/lightning/" in frame.f_code.co_filename or "/torch/" in frame.f_code.co_filename:
        return False
    while frame is not None and frame.f_code.co_name not in STEP:
        frame = frame.f_back
    return frame is not None


def _of_parameters(outputs: Any, inputs: Any, *args: Any, **options: Any) -> bool:
    """Whether `torch.autograd.grad` is asked for gradients of parameters."""
    return any(isinstance(i, nn.Parameter) for i in ([inputs] if isinstance(inputs, torch.Tensor) else inputs))


def _trial(subject: Subject, fabric: Fabric | None, batch_size: int, drawing: dict[str, int], **how: Any) -> Trial:
    stream = subject.stream({Kind.INTERACT})
    world = fabric.world_size if fabric else 1
    own = {name: max(1, n // PROCESSES) * PROCESSES // world for name, n in drawing.items()}
    strategy = subject.build(stream, **(subject.options(world) | own))
    if any(isinstance(m, _BatchNorm) for m in strategy.modules()):
        strategy.lr = 0.0005  # on a handful of values it makes rounding grow a hundredfold with each larger step
    return subject.trial(strategy, stream, fabric=fabric, batch_size=batch_size, seed=SEED, **how)


def _alone(subject: Subject, found: Any, **how: Any) -> State:
    """The state that one process with the batches of all ends with, from the beginning or from a `state`."""
    return subject.finish(_trial(subject, None, PROCESSES * BATCH, found["states"][0]["drawing"], **how)).state


def compare(subject: Subject, found: Any) -> None:
    """Judge what `in_processes` found."""
    _ended(found)
    one = _alone(subject, found)
    for rank, state in enumerate(found["states"]):
        if wrong := State(one.plain, state["tensors"]).differences(one, TOLERANCE):
            what = f"process {rank} of two ends elsewhere than one process: {listed(wrong)}"
            raise CheckFailed(f"{what}; {_cause(subject, state)}")


def go_on(subject: Subject, found: Any) -> None:
    """Judge where one process ends that goes on with what `in_processes` found midway."""
    _ended(found)
    midway = found["states"][0]["midway"]
    one = _alone(subject, found)
    state = State(json.loads(midway["plain"]), midway["tensors"])
    gone_on = _alone(subject, found, state=state)
    if wrong := State(one.plain, gone_on.tensors).differences(one, TOLERANCE):
        raise CheckFailed(f"one process that goes on with what two began ends elsewhere than one: {listed(wrong)}")


def _ended(found: Any) -> None:
    if "refused" in found:
        raise NotApplicable(found["refused"])
    if "raised" in found:
        raise CheckFailed(f"raised on two processes: {found['raised']}")


def _cause(subject: Subject, state: dict[str, Any]) -> str:
    """What is most likely wrong where processes part."""
    if state["apart"]:
        return (
            f"the gradient taken in {state['apart'][0]} is not averaged over processes: "
            "use clplat.second_gradient(loss, parameters, self.world_size)"
        )
    fixed = drawn(subject) - {*state["drawing"].values(), *subject.options().values()}
    if fixed:
        return (
            f"each process draws {min(fixed)} remembered samples, and so does one process alone: let an option say how "
            "many a process draws"
        )
    return (
        "reduce losses by self.mean, call memory.add and memory.sample on every process, and bring together by "
        "torch.distributed what each process sums up"
    )
