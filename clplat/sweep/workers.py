"""Several workers on one study, by a launcher: given out, waited on, and replaced at once where one dies."""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clplat import errors
from clplat.errors import Interrupted, UserError
from clplat.launchers.choice import Launch
from clplat.launchers.jobs import Job, Outcome, say, stopping
from clplat.sweep.early import Run
from clplat.sweep.owners import is_called
from clplat.sweep.plan import Plan
from clplat.sweep.store import open_study, storage_faults
from clplat.sweep.trials import Reaper, is_done, work

MAX_IDLE_DEATHS = 3  # of workers that held no trial, after which none is started again


class Worker(Job):
    """Takes trials until the study has all of them. Who gave it out counts its deaths, by the trials it took along."""

    again = 0

    def __init__(self, plan: Plan, run: Run) -> None:
        self.plan, self.run, self.badge = plan, run, secrets.token_hex(4)
        self.folder, self.output, self.devices = Path.cwd(), plan.folder, plan.devices

    def do(self) -> Outcome:
        with storage_faults(self.plan, opened=True):
            work(open_study(self.plan, None), self.plan, self.run, badge=self.badge)
        return {}


def employ(study: Any, plan: Plan, count: int, run: Run, launch: Launch, told: Callable[[], None]) -> None:
    """Let `count` workers work until the study has all its trials.

    Args:
        told: called every few seconds.

    Raises:
        Interrupted: asked to stop by Ctrl-C or SIGTERM; runs under way have checkpoints, their trials were given back.
        ClplatError: what stopped a worker: missing data, say.
    """
    if is_done(study.get_trials(deepcopy=False), plan):
        return
    reap, idle_deaths = Reaper(study, plan), 0

    def look() -> None:
        told()
        reap()

    workers = [Worker(plan, run) for _ in range(count)]
    with stopping("sweep"), contextlib.closing(launch(workers, told=look)) as outcomes:
        for number, outcome in outcomes:
            if not outcome.get("lost"):
                if outcome.get("error") not in (None, "Interrupted"):
                    raise getattr(errors, outcome["error"])(*outcome["faults"])
                continue
            how, badge = outcome["faults"][0], workers[number].badge
            reap.left_by(badge, counted=True)
            names = (t.user_attrs.get("worker", "") for t in study.get_trials(deepcopy=False))
            idle_deaths += not any(is_called(name, badge) for name in names)
            if idle_deaths > MAX_IDLE_DEATHS:
                raise UserError(f"sweep: workers end before they take a trial ({how})")
            say(f"a worker is gone ({how}); another goes on with its trial")
            workers.append(Worker(plan, run))
    told()
    if not is_done(study.get_trials(deepcopy=False), plan):
        raise Interrupted("sweep: its workers were stopped")
