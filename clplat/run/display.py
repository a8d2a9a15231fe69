"""Progress of a run on the screen, with the time that is left."""

from __future__ import annotations

import sys
import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clplat.stream import Experience

_REFRESH_SECONDS = 0.2


class Display:
    """One bar over the whole stream; off a terminal, one line after each experience.

    Args:
        title: what runs.
        total_steps: steps of the whole stream, as far as known.
        experiences: number of experiences.
    """

    def __init__(self, title: str, total_steps: int, experiences: int) -> None:
        self.console = Console(file=sys.stderr)
        self.title, self.experiences, self.total = title, experiences, total_steps
        self.live = self.console.is_terminal
        self.loss, self.shown_at, self.started = "", 0.0, time.monotonic()
        if self.live:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
            self.bar = Progress(*columns, console=self.console, transient=True, auto_refresh=False)
            self.task = self.bar.add_task(title, total=total_steps, note="")
            self.bar.start()

    def describe(self, experience: Experience) -> None:
        """Name the experience that is under way."""
        if self.live:
            text = f"{self.title}  {experience.index + 1}/{self.experiences} {experience.kind} {experience.name}"
            self.bar.update(self.task, description=text, refresh=True)

    def advance(self, total_steps: int) -> None:
        """Called every step; draws a few times a second."""
        if self.live and (now := time.monotonic()) - self.shown_at > _REFRESH_SECONDS:
            self.shown_at = now
            self.bar.update(self.task, completed=total_steps, note=self.loss, refresh=True)

    def show(self, metrics: dict[str, float]) -> None:
        """Remember the loss for the next drawing."""
        if "train/loss" in metrics:
            self.loss = f"loss {metrics['train/loss']:.3f}"

    def experience(self, finished: int, metrics: dict[str, float]) -> None:
        """One line after an experience."""
        known = (f"{k.replace('_', ' ')} {metrics[k]:.3f}" for k in ("average_accuracy", "forgetting", "online_error")
                 if metrics.get(k) is not None)  # fmt: skip
        seconds = time.monotonic() - self.started
        left = seconds / finished * (self.experiences - finished)
        clock = f"[{seconds:.0f} s, about {left:.0f} s left]"
        line = f"{self.title}  {finished}/{self.experiences}  {', '.join(known)}  {clock}"
        self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.live:
            self.bar.stop()
