"""What a sweep says while it runs: a line for each trial that has ended, how many of how many, and the time left."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from clplat.sweep.plan import Plan
from clplat.sweep.trials import finished, values


class Progress:
    """Told of trials as they end; on a terminal with a bar below. Use as a context."""

    def __init__(self, study: Any, plan: Plan, quiet: bool) -> None:
        self.study, self.plan, self.quiet = study, plan, quiet
        self.told = {t.number for t in study.get_trials(deepcopy=False) if finished(t)}
        self.before, self.began = len(self.told), time.monotonic()
        self.ended = self.began  # the last trial
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Progress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        if not self.quiet and (console := Console()).is_terminal:
            name = self.plan.study if len(self.plan.study) <= 20 else f"{self.plan.study[:19]}…"  # figures need room
            columns = TextColumn("{task.description}", markup=False), BarColumn(bar_width=None), MofNCompleteColumn()
            last = TimeElapsedColumn(), TextColumn("{task.fields[left]}")
            self.bar = Bar(*columns, *last, console=console, expand=True)
            self.task = self.bar.add_task(name, total=self.plan.trials, completed=self.before, left="")
            self.bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.stop()

    def update(self) -> None:
        """Tell of the trials that have ended since the last call, here or elsewhere."""
        if self.quiet:
            return
        for trial in self.study.get_trials(deepcopy=False):
            if finished(trial) and trial.number not in self.told:
                self.told.add(trial.number)
                self.ended = time.monotonic()
                done, whole = len(self.told), self.plan.trials
                line = f"trial {trial.number}: {outcome(trial, self.plan)}  {shown(values(trial))}"
                if self.bar is None:
                    print(f"{line}  [{done} of {whole}{self._left(', ')}]", flush=True)
                else:
                    self.bar.console.print(line, markup=False, highlight=False)
        if self.bar is not None:
            self.bar.update(self.task, completed=len(self.told), left=self._left())

    def _left(self, before: str = "") -> str:
        """The time left, if trials go on as they did since this began."""
        done = len(self.told) - self.before
        remaining = self.plan.trials - len(self.told)
        if done < 1 or remaining < 1:
            return ""
        seconds = (self.ended - self.began) / done * remaining - (time.monotonic() - self.ended)
        return f"{before}about {_duration(seconds)} left" if seconds > 0 else ""


def outcome(trial: Any, plan: Plan) -> str:
    """What a trial ended with, in words."""
    if trial.state.name == "FAIL":
        return f"failed ({trial.user_attrs.get('reason', 'its workers died')})"
    if trial.state.name == "PRUNED":
        return str(trial.user_attrs.get("stopped", "stopped early"))
    text = scores(trial.values, plan)
    if "same_as" in trial.user_attrs:
        text += f" (the values of trial {trial.user_attrs['same_as']}: not run again)"
    return text + (" (the default)" if trial.user_attrs.get("default") else "")


def scores(found: Any, plan: Plan) -> str:
    """`average_accuracy 0.9123, forgetting 0.0412`."""
    return ", ".join(
        f"{m} {v:.4g}" if abs(v) >= 10 else f"{m} {v:.4f}" for m, v in zip(plan.metrics, found, strict=True)
    )


def shown(params: Mapping[str, Any]) -> str:
    """`key=value` of each."""
    return "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
