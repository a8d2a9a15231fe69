"""Start a run on one process or many, and bring it to a good end whatever happens."""

from __future__ import annotations

import atexit
import errno
import functools
import inspect
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clplat import errors as errors_module
from clplat.config.given import keys_of
from clplat.config.settings import Config, FabricSettings, flat
from clplat.erasure import late
from clplat.erasure.audit import audit
from clplat.erasure.audit.aggregates import let_go
from clplat.errors import ClplatError, Interrupted, UserError, users_code
from clplat.files import to_json, write_atomic
from clplat.lightning import Fabric
from clplat.metrics.record import RunRecord
from clplat.preprocessing import Preprocessing
from clplat.run import checkpoint, compiling, elastic, filing, model, shadows
from clplat.run.allocation import keep_freed
from clplat.run.build import build, new_record, read_reference
from clplat.run.given import check_travels
from clplat.run.loop import Runner
from clplat.run.merging import build_merge
from clplat.run.precisions import DTYPES
from clplat.run.result import Result
from clplat.run.rundir import make_run_dir
from clplat.run.runlog import RunLog
from clplat.run.saving import known_sources, restore
from clplat.run.seal import MADE_ANEW, break_seal, close_seal, digest, seal_faults
from clplat.run.sharding import Sharded
from clplat.run.start import carried_optimizer, start_run
from clplat.run.state import Watch
from clplat.run.step import total_steps
from clplat.run.summary import changes, git_commit, summary
from clplat.strategy import Strategy
from clplat.stream import Stream
from clplat.tracking.client import store_of

if TYPE_CHECKING:
    from clplat.tracking.client import Tracker

# What writes the reports of a run: (its folder, its record, folder of an oracle) → files written.
Report = Callable[[Path, RunRecord, str | None], list[Path]]

# The disk, a quota or a read-only folder stands in the way: the user's to mend, not a defect of the program.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)


def launch(
    config: Config, run_dir: Path | None, *, quiet: bool, resumed: bool = False, report: Report | None = None,
    watch: Watch | None = None, bare: bool = False,
) -> Result:  # fmt: skip
    """Run on the processes that `config.fabric` asks for. Raises as `clplat.run` does.

    Args:
        run_dir: of the run; None makes one once everything is built, so that a refused run leaves no folder.
        report: writes what is to be read of the run into its folder when it has ended, whatever its status.
        watch: may stop the run between experiences; of a run in one process.
        bare: go without the run to start from where it has not been made.
    """
    if config.tracking.enabled:
        store_of(config.tracking, config.output)  # refuses what can't be tracked before anything is made
    start = (
        None if resumed else start_run(config, None if bare else functools.partial(launch, quiet=quiet, report=report))
    )
    fabric = make_fabric(elastic.shared(config).fabric)
    if isinstance(fabric.strategy.launcher, _spawning()):
        check_travels(config)
        with _forwarded_signals(), _same_environment():
            outcome = fabric.launch(_guarded, config, run_dir, start, quiet, resumed, report)
    else:
        fabric.launch()
        if not resumed and (begun := elastic.begun(fabric, config)) is not None:
            run_dir, start, resumed = begun, None, True
        with users_code():
            outcome = _work(fabric, config, run_dir, start, quiet, resumed, report, watch)
    if "error" in outcome:
        error = getattr(errors_module, outcome["error"])(*outcome["faults"])
        error.add_note(outcome["traceback"])
        raise error
    return Result(Path(outcome["run_dir"]), outcome["summary"], outcome["note"])


def make_fabric(settings: FabricSettings) -> Fabric:
    """Fabric with our settings; several local processes are spawned, those of torchrun or SLURM are joined."""
    from lightning.fabric.strategies import DDPStrategy
    from torch.nn.parallel import DistributedDataParallel

    strategy: Any = settings.strategy
    method: Any = "popen" if elastic.from_outside(settings.num_nodes) else "spawn"
    if strategy == "fsdp":
        strategy = Sharded(start_method=method)
    elif settings.devices * settings.num_nodes > 1 or strategy == "ddp":
        # Buffers hold memories and importances, which strategies keep equal themselves. Which parameters get no
        # gradient changes from step to step (old heads, experts, prompts), and DDP told otherwise ends the run;
        # looking for them costs a walk over the graph, 21 µs of a step of ViT-tiny, and one more small all-reduce.
        known = inspect.signature(DistributedDataParallel).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
        options: dict[str, Any] = {buffers: False, "find_unused_parameters": True}
        strategy = DDPStrategy(start_method=method, **options)
    try:
        return Fabric(
            accelerator=settings.accelerator,
            devices=settings.devices,
            num_nodes=settings.num_nodes,
            strategy=strategy,
            precision="32-true" if settings.precision in DTYPES else settings.precision,  # which casts nothing
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(f"fabric: {' '.join(str(error).split())}") from error


def faults(config: Config, stream: Stream) -> list[str]:
    """Why what is asked for after the run's end, its learner as a model and shadow models, can't be made."""
    return model.faults(config, stream.preprocessing()) + shadows.faults(config, stream)


def _spawning() -> type:
    from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher

    return _MultiProcessingLauncher


def _guarded(fabric: Fabric, *args: Any) -> dict[str, Any]:
    """What a run gives, in values that travel between processes: summary and note, or an error's name and lines."""
    try:
        with users_code():
            return _work(fabric, *args)
    except ClplatError as error:
        return {"error": type(error).__name__, "faults": list(error.faults), "traceback": traceback.format_exc()}


def _work(
    fabric: Fabric,
    config: Config,
    run_dir: Path | None,
    start: Path | None,
    quiet: bool,
    resumed: bool,
    report: Report | None,
    watch: Watch | None = None,
) -> dict[str, Any]:
    started, first = time.perf_counter(), fabric.global_rank == 0
    if fabric.world_size > 1:
        atexit.register(_leave)
    if config.fabric.threads is not None:
        torch.set_num_threads(config.fabric.threads)
    keep_freed()
    stream, strategy = build(config, start)
    if refused := faults(config, stream) or (compiling.check(fabric.device) if config.fabric.compile else []):
        raise UserError(*refused)
    if first:
        for line in stream.notes:
            print(f"clplat: {line}", file=sys.stderr, flush=True)
        if given := ", ".join(keys_of(config)):
            line = f"{given}: given in Python: config.yaml alone can't repeat this run (clplat.resume takes them again)"
            print(f"clplat: {line}", file=sys.stderr, flush=True)
    added = late.extend(stream, run_dir) if resumed and run_dir is not None else 0
    record = new_record(stream, read_reference(config.reference), config.loop.evaluate_on)
    for fact in record.experiences[len(stream) - added :]:
        fact.late = True
    if first and not resumed:
        run_dir = make_run_dir(config, run_dir)
        elastic.mark(run_dir)
    run_dir = Path(fabric.broadcast(str(run_dir)))
    held = checkpoint.lock(run_dir) if first else None  # until this process ends or lets go of it
    try:
        return _go(fabric, config, run_dir, stream, strategy, record, start, quiet, resumed, report, started, watch)
    finally:
        if held is not None:
            held.close()


def _go(
    fabric: Fabric, config: Config, run_dir: Path, stream: Stream, strategy: Strategy, record: RunRecord,
    start: Path | None, quiet: bool, resumed: bool, report: Report | None, started: float,
    watch: Watch | None,
) -> dict[str, Any]:  # fmt: skip
    """The run itself, in a folder that is held."""
    first = fabric.global_rank == 0
    state = _newest_state(run_dir, config, tell=first) if resumed else None
    if first:
        break_seal(run_dir)
    tracked, age = first and config.tracking.enabled, time.perf_counter() - started
    tracker = _tracker(config, run_dir, stream, record, age) if tracked else None
    log = RunLog(run_dir if first else None, started, None, tracker, state["metrics_offset"] if state else 0)
    sources = known_sources(strategy) if first and not config.loop.checkpoint_whole else None
    runner = Runner(strategy, stream, elastic.shared(config).loop, fabric, config.seed, log, record)
    runner.sources = sources
    runner.watch, runner.merge, runner.compiled = watch, build_merge(config), config.fabric.compile
    runner.audit, runner.config = config.audit, json.loads(to_json(config.to_dict()))
    before = len(state["processes"]) if state else config.fabric.devices * config.fabric.num_nodes
    try:
        filing.prepare(config, strategy, run_dir, fabric, state)
        if state is not None:
            restore(runner, state)
            state = None  # which would be held to the end beside the learner
        elif start is not None:
            runner.resumed = carried_optimizer(start, strategy)
    except ClplatError:
        log.close()
        raise
    if (said := elastic.change(before, fabric.world_size, runner.progress.total_steps)) and first:
        record.notes.append(said)
        print(f"clplat: {said}", file=sys.stderr, flush=True)
    if first and not quiet:
        from clplat.run.display import Display

        title = f"{config.name or config.strategy.name}, seed {config.seed}"
        log.display = Display(title, sum(total_steps(runner, e) for e in stream), len(stream))
    status, result = "failed", dict[str, Any](run_dir=str(run_dir), summary={}, note=None)
    try:
        with _stop_on_signal(runner):
            runner.run()
        status = "interrupted"  # until the shadow models are done, too
        whole = runner.progress.experience == len(stream)
        if whole and config.audit.shadows:
            shadows.attack(config, run_dir, fabric)
        status = "complete" if whole or config.loop.stop_after else "interrupted"
    except Interrupted as error:
        status = "interrupted"
        raise Interrupted(f"{error}; go on: clplat run --resume {run_dir}") from None
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        fault = f"output: could not write in {run_dir}: {error.strerror}; the run can be resumed"
        raise UserError(fault) from error
    finally:
        log.close()
        if first:
            result = _close(config, run_dir, record, status, tracker, report, stream.preprocessing())
    return result


def _leave() -> None:
    """End the process group before the interpreter: its threads, cut off while they ask for the lock, would abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _newest_state(run_dir: Path, config: Config, tell: bool) -> dict[str, Any] | None:
    """State of the newest whole checkpoint; what is damaged is said on stderr by one process, whether quiet or not.

    Raises:
        UserError: a sealed file that can't be made anew is damaged, or config.yaml is not the run's own.
    """
    if broken := seal_faults(run_dir, aside=MADE_ANEW):
        raise UserError(*broken)
    state, notes = checkpoint.load_newest(run_dir / "checkpoints", lambda state: _cut_log(run_dir, state))
    if state is not None and (changed := changes(state.get("config"), config)):
        raise UserError(f"resume: {run_dir / 'config.yaml'} was changed since the run began: {changed}; put it back")
    if state is None and any("metrics.jsonl" in note for note in notes):
        raise UserError(*notes, f"resume: put {run_dir / 'metrics.jsonl'} back: it is whole for no checkpoint")
    if tell:
        if notes and state is None:
            notes.append("no whole checkpoint is left: starting from the beginning")
        for note in notes:
            print(f"clplat: {note}", file=sys.stderr, flush=True)
        checkpoint.clean(run_dir)
    return state


def _cut_log(run_dir: Path, state: dict[str, Any]) -> str | None:
    """Why metrics.jsonl is not what a checkpoint goes on from: shorter, or another text."""
    path, size = run_dir / "metrics.jsonl", int(state["metrics_offset"])
    there = path.stat().st_size if path.is_file() else 0
    if there < size:
        return f"metrics.jsonl has {there} bytes, {size} were written when it was made"
    known = state.get("metrics_sha256")
    return "metrics.jsonl was changed" if known not in (None, digest(path, size) if size else known) else None


def _close(
    config: Config, run_dir: Path, record: RunRecord, status: str, tracker: Tracker | None, report: Report | None,
    preprocessing: Preprocessing,
) -> dict[str, Any]:  # fmt: skip
    """Write summary and report, and hand everything to tracking. A full disk must not hide the error that led here."""
    facts, artifacts = summary(config, record, status), [run_dir / "config.yaml"]
    try:
        write_atomic(run_dir / "summary.json", to_json(facts, indent=1))
        artifacts.append(run_dir / "summary.json")
        if report is not None:
            artifacts += report(run_dir, record, config.audit.oracle)
        if status == "complete" and not config.audit.keep_scores:
            for folder in sorted((run_dir / audit.FOLDER).glob("*")):
                let_go(folder)
        close_seal(run_dir)
        if status == "complete" and tracker is not None:
            tracker.start()  # which sets what MLflow reads
            artifacts += model.logged(run_dir, config, preprocessing)
    except OSError as error:
        if status == "complete":
            raise UserError(f"output: could not write in {run_dir}: {error.strerror}") from error
    note = None
    if tracker is not None:
        outcome = {"complete": "FINISHED", "interrupted": "KILLED"}.get(status, "FAILED")
        tracker.start()
        note = tracker.finish(outcome, [a for a in artifacts if a.exists()])
    return {"run_dir": str(run_dir), "summary": facts, "note": note}


def _tracker(config: Config, run_dir: Path, stream: Stream, record: RunRecord, age: float) -> Tracker:
    import hashlib

    from clplat.tracking.client import Tracker
    from clplat.tracking.names import GROUP_TAG, group_of, note_of_sets

    params = flat(config.to_dict())
    asked = sum(e.late for e in record.experiences)
    tags = {"strategy": config.strategy.name, "stream": config.stream.name, "backbone": config.backbone.name,
            "seed": str(config.seed), "git_commit": git_commit() or "unknown",
            GROUP_TAG: group_of(str(config.name), params)}  # fmt: skip
    tags |= {"late_requests": str(asked)} if asked else {}
    tags |= {"mlflow.note.content": note} if (note := note_of_sets([(e.name, e.title) for e in stream])) else {}
    datasets = []
    for e in stream:
        content = repr((e.name, e.kind, e.classes, e.train and len(e.train), e.test and len(e.test)))
        datasets.append((f"{config.stream.name}/{e.name}"[:500], hashlib.sha256(content.encode()).hexdigest()[:16]))
    return Tracker(
        run_dir,
        config.tracking,
        run_name=f"{config.name}-{config.seed}",
        params=params,
        tags=tags,
        datasets=datasets,
        age=age,
    )


@contextmanager
def _on_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call `handler` on Ctrl-C and SIGTERM; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


def _stop_on_signal(runner: Runner) -> AbstractContextManager[None]:
    """The first signal asks for a stop after the current step; the second stops at once."""

    def ask(number: int, frame: Any) -> None:
        if runner.stop_requested and runner.world_size == 1:
            raise KeyboardInterrupt
        runner.stop_requested = True

    return _on_signals(ask)


def _forwarded_signals() -> AbstractContextManager[None]:
    """While spawned processes run, pass signals on to them instead of dying under them."""
    import multiprocessing

    def forward(number: int, frame: Any) -> None:
        for child in multiprocessing.active_children():
            if child.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(child.pid, number)

    return _on_signals(forward)


@contextmanager
def _same_environment() -> Iterator[None]:
    """Undo what launching leaves in the environment, and keep one warning of DDP's out of the spawned processes."""
    before = dict(os.environ)
    # Read when torch is loaded: DDP warns that looking for unused parameters found none, which is no fault.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        yield
    finally:
        for key in os.environ.keys() - before.keys():
            del os.environ[key]
        os.environ.update(before)
