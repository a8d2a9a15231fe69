"""Where measurements go while a run is under way: `metrics.jsonl` (the truth), the screen, and tracking."""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.files import to_json, write_atomic
from clplat.stream import Experience

if TYPE_CHECKING:
    from clplat.run.display import Display
    from clplat.run.progress import Progress
    from clplat.tracking.client import Tracker


class RunLog:
    """Writer of one run's measurements; on processes other than 0 it does nothing.

    Args:
        run_dir: folder of `metrics.jsonl`; None writes nowhere.
        started: time.perf_counter() at the start of the run.
        display: progress on the screen, or None.
        tracker: MLflow, or None.
        offset: bytes of `metrics.jsonl` that belong to the checkpoint resumed from; what follows is cut off.
    """

    def __init__(
        self,
        run_dir: Path | None,
        started: float,
        display: Display | None = None,
        tracker: Tracker | None = None,
        offset: int = 0,
    ) -> None:
        self.run_dir, self.started, self.display, self.tracker = run_dir, started, display, tracker
        self._file, self._tracking = None, False
        self._entered: list[str] = []  # events that others follow in the ledger: they change no more
        if run_dir is not None:
            path = run_dir / "metrics.jsonl"
            path.touch()
            os.truncate(path, offset)
            self._digest = hashlib.sha256(path.read_bytes())
            self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 - closed by `close`

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Measurements after optimisation step `step` of the run."""
        self._write("step", step, metrics)
        if self.display is not None:
            self.display.show(metrics)

    def experience(self, finished: int, metrics: dict[str, float]) -> None:
        """Measurements after `finished` experiences."""
        self._write("experience", finished, metrics)
        if self.display is not None:
            self.display.experience(finished, metrics)

    def _write(self, axis: str, step: int, metrics: dict[str, float]) -> None:
        if self._file is None:
            return
        line = {"axis": axis, "step": step, "time": round(time.time(), 3), "metrics": metrics}
        text = to_json(line) + "\n"
        self._digest.update(text.encode())
        self._file.write(text)
        self._file.flush()
        if self._tracking and self.tracker is not None:
            self.tracker.notify()

    def start_tracking(self) -> None:
        """Called after the first step, so that importing MLflow delays neither it nor those after it."""
        if self.tracker is not None and not self._tracking:
            self.tracker.start()
            self._tracking = True

    def describe(self, experience: Experience) -> None:
        """The experience that starts or goes on now."""
        if self.display is not None:
            self.display.describe(experience)

    def advance(self, progress: Progress) -> None:
        """A step was taken."""
        if self.display is not None:
            self.display.advance(progress.total_steps)

    def scoring(self, done: int, total: int) -> None:
        """So many of `total` test samples of this process are scored in the evaluation under way."""
        if self.display is not None:
            self.display.scoring(done, total)

    def ledger(self, events: list[dict[str, Any]]) -> None:
        """What was learned and erased so far, whole or not at all."""
        if self.run_dir is not None:
            self._entered += [to_json(e) for e in events[len(self._entered) : -1]]
            lines = [*self._entered, to_json(events[-1])]
            write_atomic(self.run_dir / "ledger.json", "[" + ",\n ".join(lines) + "]\n")

    def offset(self) -> int:
        """Bytes written so far."""
        return 0 if self._file is None else self._file.tell()

    def sha256(self) -> str | None:
        """Digest of what was written so far; None where nothing is."""
        return None if self._file is None else self._digest.hexdigest()

    def age(self) -> float:
        """Seconds since the start of the run."""
        return time.perf_counter() - self.started

    def close(self) -> None:
        """Close the file and the screen; tracking is finished by the caller."""
        if self._file is not None:
            self._file.close()
        if self.display is not None:
            self.display.close()
