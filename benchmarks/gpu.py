"""`python -m benchmarks.gpu` (`make gpu`): what a GPU has to show, in eight minutes at most, in one JSON file.

The tests marked `gpu`, then steps next to hand-written loops (`gpu_parts.py`). Each part has its share of the time; one
that takes longer is ended with the figures it has, and the whole stops itself after `--seconds`: what was not reached
is named. Needs no network. Without a GPU it says so in one line, and that is no error.

Options: --device cpu --small takes every part on tiny models, which shows that it runs; --seconds S gives parts longer
or less, all alike; --output FILE; --only PART...
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from benchmarks.__main__ import RESULTS, _processor, _slug

SECONDS = 480.0
VERSIONS = ("clplat", "torch", "lightning", "timm", "transformers", "peft")


class Worker(Protocol):
    """A process that does parts (`gpu_parts.work`)."""

    def get(self, seconds: float) -> tuple[str, str, Any] | None:
        """What it sends next; None where nothing comes in so many seconds. Raises EOFError where it has died."""

    def end(self) -> None:
        """It, and all it has started."""


class Process:
    """A worker in a process group of its own."""

    def __init__(self, names: list[str], device: str, small: bool) -> None:
        from benchmarks.gpu_parts import work

        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe(duplex=False)
        self.process = context.Process(target=work, args=(names, device, small, theirs))
        self.process.start()
        theirs.close()

    def get(self, seconds: float) -> tuple[str, str, Any] | None:
        return self.connection.recv() if self.connection.poll(max(seconds, 0.0)) else None

    def end(self) -> None:
        for stop in (lambda: os.killpg(self.process.pid or 0, signal.SIGKILL), self.process.kill):
            try:
                stop()
            except (ProcessLookupError, PermissionError):  # it is gone, or has no group of its own yet
                continue
        self.process.join()
        self.connection.close()


def gather(
    start: Callable[[list[str]], Worker], budgets: dict[str, float], seconds: float,
    now: Callable[[], float] = time.monotonic,
) -> list[dict[str, Any]]:  # fmt: skip
    """What became of each part: done, failed, out of time or not reached; `rows` are the figures it has.

    Args:
        start: a worker of the parts named.
        budgets: seconds of each part, in order.
        seconds: of all.
    """
    last, waiting, found, worker = now() + seconds, list(budgets), list[dict[str, Any]](), None
    try:
        while waiting and now() < last:
            name, began = waiting.pop(0), now()
            worker = worker or start([name, *waiting])
            part: dict[str, Any] = {"part": name, "status": "done", "budget_seconds": budgets[name], "rows": []}
            found.append(part)
            until = min(began + budgets[name], last)
            try:
                while (message := worker.get(until - now())) is not None and message[1] == "row":
                    part["rows"].append(message[2])
                if message is None:
                    part |= {"status": "out of time", "why": f"stopped after {now() - began:.0f} s"}
                elif message[2] is not None:
                    part |= {"status": "failed", "why": message[2]}
            except EOFError:
                part |= {"status": "failed", "why": "its process died"}
                message = None
            part["seconds"] = round(now() - began, 1)
            if message is None:  # a fresh one goes on with the next part
                worker.end()
                worker = None
    finally:
        if worker is not None:
            worker.end()
    late = {"status": "not reached", "why": f"the whole has {seconds:g} s", "seconds": 0.0, "rows": []}
    return found + [{"part": name, "budget_seconds": budgets[name], **late} for name in waiting]


def card(device: str) -> dict[str, Any]:
    """What the device is."""
    if device == "cpu":
        return {"type": "cpu", "name": _processor()}
    import torch

    known = torch.cuda.get_device_properties(0)
    return {
        "type": "cuda", "name": known.name, "memory_bytes": known.total_memory,
        "capability": f"{known.major}.{known.minor}", "cuda": torch.version.cuda,
    }  # fmt: skip


def good(parts: list[dict[str, Any]]) -> bool:
    """Whether every part is done, no test has failed, and every limit is kept."""
    rows = [row for part in parts for row in part["rows"]]
    bad = any(row.get("passed") is False or row.get("outcome") in ("failure", "error") for row in rows)
    return not bad and all(part["status"] == "done" for part in parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code 1 where a part is not done, a test has failed or a limit is not kept."""
    import torch

    from benchmarks.gpu_parts import PARTS

    began = time.monotonic()
    parser = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--seconds", type=float, default=SECONDS)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: torch.cuda.is_available() is False; nothing was run (--device cpu --small shows that it runs)")
        return 0
    budgets = {name: PARTS[name][0] * options.seconds / SECONDS for name in PARTS if name in options.only}
    found = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "device": card(options.device),
        "small": options.small, "limit_seconds": options.seconds, "python": platform.python_version(),
        "versions": {name: version(name) for name in VERSIONS},
    }  # fmt: skip
    left = options.seconds - (time.monotonic() - began)
    parts = gather(lambda names: Process(names, options.device, options.small), budgets, left)
    found |= {"seconds": round(time.monotonic() - began, 1), "parts": parts}
    path = options.output or _place(options.device, found["device"]["name"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    for part in parts:
        said = f"{part['part']}: {part['status']}, {len(part['rows'])} figures, {part['seconds']} s"
        print(f"{said} ({part['why']})" if "why" in part else said)
    print(f"written to {path}", file=sys.stderr)
    return 0 if good(parts) else 1


def _place(device: str, name: str) -> Path:
    """Results of a card are kept; those of a CPU are none of a card's."""
    folder = RESULTS / "gpu" if device != "cpu" else Path(tempfile.mkdtemp(prefix="clplat-gpu-"))
    return folder / f"{_slug(name)}.json"


if __name__ == "__main__":
    sys.exit(main())
