"""Who works on a trial: a name of a thread that tells, on its own machine, whether it still lives."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path


def me(badge: str = "") -> str:
    """Name of this thread: machine, number (of a process's first, the process's), and when it began; a later one of the
    same number is another.

    Args:
        badge: by which whoever gave its work out knows it, wherever it is done.
    """
    pid = threading.get_native_id()
    return f"{badge}{'@' * bool(badge)}{_machine()}:{pid}:{_began(pid)}"


def is_called(owner: str, name: str) -> bool:
    """Whether `name` is a thread's name, or its badge."""
    return name in (owner, owner.partition("@")[0])


def is_gone(owner: str) -> bool:
    """Whether a thread of this machine has ended; False where that can't be told from here."""
    machine, pid, began = owner.rsplit(":", 2)
    return machine.rpartition("@")[2] == _machine() and began != "?" and _began(int(pid)) != began


def _machine() -> str:
    """The host, and the space in which its process numbers count: each container has its own."""
    try:
        space = str(os.stat("/proc/self/ns/pid").st_ino)
    except OSError:
        space = "?"
    return f"{socket.gethostname()}/{space}"


def _began(pid: int) -> str:
    """Start of a thread in the system's ticks; empty where there is none, or only its exit code is left of it."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return "" if Path("/proc/self/stat").exists() else "?"
    except OSError:
        return "?"
    return "" if fields[0] in "ZX" else fields[19]
