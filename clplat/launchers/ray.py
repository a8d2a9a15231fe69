"""Tasks of a Ray cluster."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from clplat.errors import UserError
from clplat.launchers.jobs import DEATHS, Job, Outcome, Outcomes, failed, nothing, package

RESOURCES = ("address", "num_cpus", "num_gpus", "memory")
POLL = 0.5  # seconds between two calls of `told`


def ray(
    jobs: Sequence[Job], count: int, resources: Mapping[str, Any], told: Callable[[], None] = nothing
) -> Outcomes:  # fmt: skip
    """Tasks of a Ray cluster, `count` at a time; one whose worker or machine is lost is given out again.

    `resources` are `RESOURCES`: those of a task, memory in bytes, and `address` of a cluster that there is;
    without it one is started on this machine, and stopped in the end.
    """
    asked = {key: value for key, value in resources.items() if key != "address"}
    with session(resources.get("address")) as engine:
        with _refused():
            task = engine.remote(max_retries=DEATHS, **asked)(_call)
        waiting, known, running = deque[int](), 0, dict[Any, int]()
        try:
            while known < len(jobs) or waiting or running:
                waiting.extend(range(known, len(jobs)))
                known = len(jobs)
                while waiting and len(running) < count:
                    number = waiting.popleft()
                    running[task.options(max_retries=jobs[number].again).remote(jobs[number])] = number
                done, _ = engine.wait(list(running), num_returns=1, timeout=POLL)
                told()
                for reference in done:
                    number = running.pop(reference)
                    try:
                        outcome = engine.get(reference)
                    except engine.exceptions.RayError as error:
                        outcome = failed(error)
                    if outcome.get("error") == "Interrupted":  # by its machine: nobody here asked for it
                        waiting.append(number)
                    else:
                        yield number, outcome
        finally:
            for reference in running:
                engine.cancel(reference)
            if running:
                engine.wait(list(running), num_returns=len(running), timeout=30)


@contextlib.contextmanager
def session(address: str | None = None) -> Iterator[Any]:
    """Ray, joined or started, and left or stopped at the end; one that this process has joined already stays so."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # under `uv run` it would pack the folder and sync anew
    if address is None:  # Ray listens to every machine: only these processes know how
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    engine = package("ray", "ray")  # which reads these
    if engine.is_initialized():
        if address is not None:
            raise UserError(f"resource: address: {address}: this process has joined a Ray cluster already")
        yield engine
        return
    with _refused():
        engine.init(address=address, include_dashboard=False, log_to_driver=False, logging_level="error")
    try:
        yield engine
    finally:
        engine.shutdown()


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """What Ray says of an address or of resources, in a line."""
    try:
        yield
    except (ValueError, ConnectionError, RuntimeError, TypeError) as error:
        raise UserError(f"launcher: ray: {' '.join(str(error).split())}") from error


def _call(job: Job) -> Outcome:
    return job()
