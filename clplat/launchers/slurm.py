"""An array of SLURM jobs, by submitit."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from clplat.errors import UserError
from clplat.launchers.jobs import Job, Outcome, Outcomes, failed, nothing, package, say, stopping

POLL = 2.0  # seconds between two questions to SLURM


def slurm(
    jobs: Sequence[Job], count: int, resources: Mapping[str, Any], told: Callable[[], None] = nothing
) -> Outcomes:  # fmt: skip
    """An array of SLURM jobs, `count` of them at a time; one that is preempted goes into the queue again.

    `resources` are submitit's parameters: timeout_min, cpus_per_task, gpus_per_node, mem_gb, slurm_partition, … and
    `cluster`, which is slurm unless it is told to be `local` or `debug`.
    """
    submitit = package("submitit", "slurm")
    parameters = {"timeout_min": 24 * 60, **resources}
    folder = jobs[0].output.resolve() / "slurm"
    left: dict[int, Any] = {}
    given = 0
    try:
        with _refused():
            executor = submitit.AutoExecutor(folder, cluster=parameters.pop("cluster", "slurm"))
            executor.update_parameters(name="clplat", slurm_array_parallelism=count, **parameters)
        while given < len(jobs) or left:
            if given < len(jobs):
                with _refused():
                    submitted = executor.submit_array([Submitted(job) for job in jobs[given:]])
                left |= dict(enumerate(submitted, given))
                given = len(jobs)
                names = ", ".join(str(job.job_id) for job in submitted[:3]) + (", …" if len(submitted) > 3 else "")
                say(f"submitted {len(submitted)} jobs ({names}); their output is in {folder}")
            for number in [n for n, job in left.items() if job.done()]:
                job = left.pop(number)
                failure = job.exception()
                yield number, job.result() if failure is None else failed(failure)
            told()
            time.sleep(POLL if left else 0)
    finally:
        for job in left.values():
            job.cancel()


class Submitted:
    """A job as SLURM does it.

    SLURM announces that it takes the machine away, or that the time is over, by submitit's signal, SIGUSR2. The job
    then stops as on Ctrl-C, with a checkpoint, and puts itself into the queue. On SIGTERM it stops and leaves no
    result: whether it is queued again, as after a preemption, or not, as after scancel, SLURM has decided.
    """

    def __init__(self, job: Job) -> None:
        self.job = job

    def __call__(self) -> Outcome:
        from submitit.core.job_environment import JobEnvironment

        announced: list[int] = []

        def stop(number: int, frame: Any) -> None:
            if not announced:
                announced.append(number)
                os.kill(os.getpid(), signal.SIGTERM)

        queue_again: Any = signal.signal(signal.Signals[f"SIG{JobEnvironment.USR_SIG}"], stop)
        with stopping("job"):
            outcome = self.job()
        if outcome.get("error") != "Interrupted":
            return outcome
        if announced:
            queue_again(announced[0], None)  # and ends this process
        raise SystemExit(128 + signal.SIGTERM)

    def checkpoint(self) -> Any:
        """What is put into the queue: the same."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)


@contextlib.contextmanager
def _refused() -> Iterator[None]:
    """What submitit or sbatch says of parameters, in a line."""
    try:
        yield
    except subprocess.CalledProcessError as error:
        raise UserError(f"launcher: slurm: sbatch ended with exit code {error.returncode}: {error.stderr}") from error
    except (TypeError, ValueError, NameError, RuntimeError, OSError, AssertionError) as error:
        raise UserError(f"launcher: slurm: {' '.join(str(error).split())}") from error
