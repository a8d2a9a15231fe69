"""Progress of a run on the screen, with the time that is left."""

from __future__ import annotations

import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from clplat.stream import Experience

_REFRESH_SECONDS = 0.2
_SILENCE_SECONDS = 60.0  # at most, where lines are written


class Cell:
    """A line among the outputs of a notebook's cell, which changes where it stands."""

    def __init__(self) -> None:
        from IPython.display import display

        self.handle: Any = display({"text/plain": ""}, raw=True, display_id=True)

    def show(self, text: str) -> None:
        """Put `text` in its place."""
        self.handle.update({"text/plain": text}, raw=True)


class Display:
    """One bar over the whole stream; in a notebook one line that changes; elsewhere a line after each experience, and
    after each minute without one.

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
        self.first, self.before, self.under_way, self.line = 0, -1, title, title
        self.cell = Cell() if self.console.is_jupyter else None
        if not self.live and self.cell is None:
            self.shown_at = self.started
        if self.live:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
            self.bar = Progress(*columns, console=self.console, transient=True, auto_refresh=False)
            self.task = self.bar.add_task(title, total=total_steps, note="")
            self.bar.start()

    def describe(self, experience: Experience) -> None:
        """Name the experience that is under way."""
        if self.under_way == self.title:
            self.first = experience.index
        where = f"{experience.index + 1}/{self.experiences} {experience.kind} {experience.name}"
        self.under_way = f"{self.title}  {where}"
        if self.live:
            self.bar.update(self.task, description=self.under_way, refresh=True)

    def advance(self, total_steps: int) -> None:
        """Called every step; draws a few times a second."""
        if self.before < 0:
            self.before = total_steps - 1  # of a run that is gone on with
        if not self._due():
            return
        if self.live:
            self.bar.update(self.task, completed=total_steps, note=self.loss, refresh=True)
        else:
            of = f" of {self.total}" if self.total >= total_steps else ""
            clock = self._clock(total_steps - self.before, self.total - total_steps)
            self._say(f"{self.under_way}  step {total_steps}{of}  {self.loss}", clock)

    def scoring(self, done: int, total: int) -> None:
        """Called before each batch of an evaluation, when `done` of this process's `total` test samples are scored."""
        if not self._due():
            return
        note = f"scoring {done} of {total}"
        if self.live:
            self.bar.update(self.task, note=note, refresh=True)
        else:
            self._say(f"{self.under_way}  {note}", self._clock(1, 0))

    def show(self, metrics: dict[str, float]) -> None:
        """Remember the loss for the next drawing."""
        if "train/loss" in metrics:
            self.loss = f"loss {metrics['train/loss']:.3f}"

    def experience(self, finished: int, metrics: dict[str, float]) -> None:
        """One line after an experience; of a notebook, in the place of the line before."""
        known = (f"{k.replace('_', ' ')} {metrics[k]:.3f}" for k in ("average_accuracy", "forgetting", "online_error")
                 if metrics.get(k) is not None)  # fmt: skip
        clock = self._clock(finished - self.first, self.experiences - finished)
        self._say(f"{self.title}  {finished}/{self.experiences}  {', '.join(known)}", clock)
        self.shown_at = time.monotonic()

    def _due(self) -> bool:
        """Whether it is time to draw again; if so, it is taken to be done."""
        now, lines = time.monotonic(), not self.live and self.cell is None
        if now - self.shown_at <= (_SILENCE_SECONDS if lines else _REFRESH_SECONDS):
            return False
        self.shown_at = now
        return True

    def _say(self, line: str, clock: str) -> None:
        self.line = line
        if self.cell is not None:
            self.cell.show(f"{line}  {clock}")
        else:
            self.console.print(f"{line}  {clock}", highlight=False, markup=False, soft_wrap=True)

    def _clock(self, done: int, remaining: int) -> str:
        """The time since it began and what is left, if what remains goes on as what was done."""
        seconds = time.monotonic() - self.started
        left = f", about {seconds / done * remaining:.0f} s left" if remaining > 0 else ""
        return f"[{seconds:.0f} s{left}]"

    def close(self) -> None:
        """Take the bar off the screen; what stands in a notebook waits for nothing more."""
        if self.live:
            self.bar.stop()
        elif self.cell is not None:
            self.cell.show(f"{self.line}  {self._clock(1, 0)}")
