"""Processes of this machine, which do one job after the other."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from clplat.launchers.jobs import Job, Outcomes, lost, nothing, say

POLL = 0.5  # seconds between two calls of `told`


def local(
    jobs: Sequence[Job], count: int, resources: Mapping[str, Any], told: Callable[[], None] = nothing
) -> Outcomes:  # fmt: skip
    """Processes of this machine, which share its cores and have its GPUs in turn."""
    waiting, known, deaths = deque[int](), 0, dict[int, int]()
    gpus = devices(os.environ)
    free = deque(range(count))
    team: dict[Any, tuple[_Process, int]] = {}
    idle: list[_Process] = []
    try:
        while known < len(jobs) or waiting or team:
            waiting.extend(range(known, len(jobs)))
            known = len(jobs)
            while waiting and (idle or free):
                worker = idle.pop() if idle else _Process(free.popleft(), count, gpus)
                if not worker.takes(jobs[waiting[0]]):  # killed while it had nothing to do
                    free.append(worker.place)
                    continue
                team[worker.ear] = worker, waiting.popleft()
            ended = wait(list(team), timeout=POLL)
            told()
            for ear in ended:
                worker, number = team.pop(ear)
                try:
                    outcome = worker.ear.recv()
                    idle.append(worker)
                except (EOFError, ConnectionResetError):
                    free.append(worker.place)
                    how, again = worker.how_it_ended(), jobs[number].again
                    deaths[number] = deaths.get(number, 0) + 1
                    if deaths[number] <= again:
                        say(f"a process ended {how}; another goes on")
                        waiting.appendleft(number)
                        continue
                    outcome = lost(f"ended {how}" + (", each time" if again else ""))
                yield number, outcome
    finally:
        _stop([*idle, *(w for w, _ in team.values())])


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

    def takes(self, job: Job) -> bool:
        """Give it a job; False where it has ended."""
        if self.process.is_alive():
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.ear.send(job)
                return True
        return False

    def how_it_ended(self) -> str:
        """By which signal, or with which exit code, once it has."""
        self.process.join()
        code = self.process.exitcode or 0
        return f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"


def _stop(workers: Sequence[_Process]) -> None:
    """SIGTERM, once: runs under way write their checkpoints."""
    for worker in workers:
        worker.process.terminate()
        worker.ear.close()
    for worker in workers:
        worker.process.join()


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
        if gpu is not None and job.devices == 1:
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
