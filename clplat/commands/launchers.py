"""Where runs of one command are done: in processes of this machine, as an array of SLURM jobs, or over a Ray cluster.

A job brings a run to its end from wherever it stands, so that one that was killed or preempted is given out again.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from clplat.config.settings import Config
from clplat.errors import ClplatError, Interrupted, MissingError, UserError

Outcome = dict[str, Any]
"""What a job ends with: `run_dir`, or `error`, the name of one of ours, with its `faults`."""

Outcomes = Generator[tuple[int, Outcome], None, None]
"""As jobs end: the place of each, and what it ended with."""

DEATHS = 2  # of the processes that do a job, after which it is not given out again
POLL = 2.0  # seconds between questions to SLURM


@dataclass(frozen=True)
class Job:
    """A run as a process anywhere does it.

    Args:
        folder: in which relative paths of the configuration mean something.
        since: runs that were begun before this time, %Y%m%d-%H%M%S, are not gone on with; empty: any is.
    """

    config: Config
    folder: Path
    since: str = ""

    def __call__(self) -> Outcome:
        os.chdir(self.folder)
        sys.path.insert(0, str(self.folder))
        from clplat.api import resume, run_config
        from clplat.run.former import former

        try:
            known = former(self.config)
            if known is None or known.status == "unusable" or known.run_dir.name < self.since:
                return {"run_dir": str(run_config(self.config, quiet=True).run_dir.resolve())}
            if known.status == "partial":
                resume(known.run_dir, quiet=True)
            return {"run_dir": str(known.run_dir.resolve())}
        except ClplatError as error:
            return {"error": type(error).__name__, "faults": list(error.faults)}

    def checkpoint(self) -> Any:
        """What submitit puts into the queue again when SLURM takes the machine away: the same job."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


def local(jobs: Sequence[Job], count: int, resources: Mapping[str, Any]) -> Outcomes:
    """Processes of this machine, which share its cores and have its GPUs in turn."""
    _only(resources, "local", ())
    waiting, deaths = deque(range(len(jobs))), dict.fromkeys(range(len(jobs)), 0)
    gpus = devices(os.environ)
    free = deque(range(count))
    team: dict[Any, tuple[_Process, int]] = {}
    idle: list[_Process] = []
    try:
        while waiting or team:
            while waiting and (idle or free):
                worker = idle.pop() if idle else _Process(free.popleft(), count, gpus)
                if not worker.process.is_alive():  # killed while it had nothing to do
                    free.append(worker.place)
                    continue
                number = waiting.popleft()
                worker.ear.send(jobs[number])
                team[worker.ear] = worker, number
            for ear in wait(list(team)):
                worker, number = team.pop(ear)
                try:
                    yield number, worker.ear.recv()
                    idle.append(worker)
                except (EOFError, ConnectionResetError):
                    free.append(worker.place)
                    how = worker.how_it_ended()
                    deaths[number] += 1
                    if deaths[number] > DEATHS:
                        yield number, {"error": "ClplatError", "faults": [f"its process ended {how}, each time"]}
                    else:
                        _say(f"a process ended {how}; another goes on")
                        waiting.appendleft(number)
    finally:
        for worker in [*idle, *(w for w, _ in team.values())]:
            worker.stop()


class _Process:
    """A process that does one job after the other, and the end of a pipe to it."""

    def __init__(self, place: int, count: int, gpus: Sequence[str]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads this process has
        self.place = place
        self.ear, theirs = context.Pipe()
        threads = max(1, len(os.sched_getaffinity(0)) // count) if hasattr(os, "sched_getaffinity") else 1
        gpu = gpus[place % len(gpus)] if gpus else None
        self.process = context.Process(target=_serve, args=(theirs, threads, gpu))
        self.process.start()
        theirs.close()

    def how_it_ended(self) -> str:
        """By which signal, or with which exit code, once it has."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"

    def stop(self) -> None:
        """SIGTERM, once: a run under way writes its checkpoint."""
        self.process.terminate()
        self.ear.close()
        self.process.join()


def _serve(mouth: Connection, threads: int, gpu: str | None) -> None:
    """Do what comes in, alone in its process group: Ctrl-C is the parent's, which passes it on as SIGTERM."""
    os.setpgrp()
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # read when torch is imported, by the first job
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job = mouth.recv()
        except EOFError:
            return
        if gpu is not None and job.config.fabric.devices == 1:
            os.environ["CUDA_VISIBLE_DEVICES"] = gpu
        outcome = job()
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # nobody waits any more
            mouth.send(outcome)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def devices(environment: Mapping[str, str]) -> list[str]:
    """Names of the GPUs that processes may have; empty without any."""
    if (told := environment.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in told.split(",") if name]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, env=dict(environment))
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i, line in enumerate(li for li in listed.stdout.splitlines() if li.startswith("GPU "))]


def slurm(jobs: Sequence[Job], count: int, resources: Mapping[str, Any]) -> Outcomes:
    """An array of SLURM jobs, `count` of them at a time; one that is preempted goes into the queue again.

    `resources` are submitit's parameters: timeout_min, cpus_per_task, gpus_per_node, mem_gb, slurm_partition, … and
    `cluster`, which is slurm unless it is told to be `local` or `debug`.
    """
    submitit = _package("submitit", "slurm")
    parameters = {"timeout_min": 24 * 60, **resources}
    folder = Path(jobs[0].config.output).resolve() / "slurm"
    try:
        executor = submitit.AutoExecutor(folder, cluster=parameters.pop("cluster", "slurm"))
        executor.update_parameters(name="clplat", slurm_array_parallelism=count, **parameters)
        submitted = executor.map_array(_call, jobs)
    except (TypeError, ValueError, NameError, RuntimeError, OSError, AssertionError) as error:
        raise UserError(f"launcher: slurm: {' '.join(str(error).split())}") from error
    except subprocess.CalledProcessError as error:
        raise UserError(f"launcher: slurm: sbatch ended with exit code {error.returncode}: {error.stderr}") from error
    names = ", ".join(str(job.job_id) for job in submitted[:3]) + (", …" if len(submitted) > 3 else "")
    _say(f"submitted {len(submitted)} jobs ({names}); their output is in {folder}")
    left = dict(enumerate(submitted))
    try:
        while left:
            for number in [n for n, job in left.items() if job.done()]:
                job = left.pop(number)
                failure = job.exception()
                yield number, job.result() if failure is None else _failed(failure)
            time.sleep(POLL if left else 0)
    finally:
        for job in left.values():
            job.cancel()


def ray(jobs: Sequence[Job], count: int, resources: Mapping[str, Any]) -> Outcomes:
    """Tasks of a Ray cluster, `count` at a time; one whose worker or machine is lost is given out again.

    `resources` are those of a task, num_cpus, num_gpus and memory (bytes), and `address` of a cluster that there is;
    without it one is started on this machine, and stopped in the end.
    """
    _only(resources, "ray", ("address", "num_cpus", "num_gpus", "memory"))
    asked = dict(resources)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run` it would pack the folder and sync anew
    if (address := asked.pop("address", None)) is None:  # Ray listens to every machine: only these processes know how
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    engine = _package("ray", "ray")  # which reads these
    try:
        engine.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
        task = engine.remote(max_retries=DEATHS, **asked)(_call)
    except (ValueError, ConnectionError, RuntimeError, TypeError) as error:
        raise UserError(f"launcher: ray: {' '.join(str(error).split())}") from error
    waiting, running = deque(range(len(jobs))), dict[Any, int]()
    try:
        while waiting or running:
            while waiting and len(running) < count:
                number = waiting.popleft()
                running[task.remote(jobs[number])] = number
            done, _ = engine.wait(list(running), num_returns=1)
            for reference in done:
                number = running.pop(reference)
                try:
                    yield number, engine.get(reference)
                except engine.exceptions.RayError as error:
                    yield number, _failed(error)
    finally:
        for reference in running:
            engine.cancel(reference)
        if running:
            engine.wait(list(running), num_returns=len(running), timeout=30)
        engine.shutdown()


LAUNCHERS: dict[str, Callable[..., Outcomes]] = {
    "local": local,
    "slurm": slurm,
    "ray": ray,
}


@contextlib.contextmanager
def stopping() -> Iterator[None]:
    """SIGTERM stops what was given out too, instead of leaving it without a parent."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise Interrupted("run: stopped")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _say(line: str) -> None:
    print(f"clplat: {line}", file=sys.stderr, flush=True)


def _call(job: Job) -> Outcome:
    return job()


def _failed(error: BaseException) -> Outcome:
    return {"error": "ClplatError", "faults": [f"its process failed: {' '.join(str(error).split())[-300:]}"]}


def _package(name: str, launcher: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingError(f"launcher: {launcher} needs {name} ({error}): pip install 'clplat[{launcher}]'") from error


def _only(resources: Mapping[str, Any], launcher: str, known: Sequence[str]) -> None:
    if other := sorted(resources.keys() - set(known)):
        valid = ", ".join(known) or "none: it has what this machine has, shared by --jobs"
        raise UserError(*(f"resource: {launcher} knows no {key} (valid: {valid})" for key in other))
