"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


class CheckFailed(Exception):
    """What is checked breaks what the check guards; the message says where."""


class NotApplicable(Exception):
    """The check says nothing about what is checked; the message says why."""


@dataclass(frozen=True)
class CheckResult:
    """One check of one strategy or stream.

    Args:
        name: of the check.
        message: what is wrong (failed), or the reason (not applicable); empty where it passed.
    """

    name: str
    status: Literal["passed", "failed", "not applicable"]
    message: str = ""


def expect(holds: bool, message: str) -> None:
    """Fail the check with `message` unless `holds`."""
    if not holds:
        raise CheckFailed(message)


def listed(names: list[str], limit: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
