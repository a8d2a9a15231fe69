"""What is searched where nobody says: the ranges that strategies declare (`Strategy.searched`)."""

from __future__ import annotations

from typing import Any

from clplat.config import discovery
from clplat.errors import UserError
from clplat.sweep.space import Span, read_span


def spans(entry: discovery.Entry) -> dict[str, Span]:
    """Configuration key → what a sweep over this strategy searches.

    Raises:
        UserError: it declares something else than ranges and choices, or nothing.
    """
    found = {f"strategy.{name}": span(name, value) for name, value in discovery.searched(entry).items()}
    if not found:
        raise UserError(f"sweep.space: is empty, and {entry.name} declares nothing to search (give keys)")
    return found


def span(name: str, declared: Any) -> Span:
    """(low, high), (low, high, "log") or [choice, ...] as a span."""
    faults: list[str] = []
    if isinstance(declared, list):
        entry: dict[str, Any] = {"choices": declared}
    elif isinstance(declared, tuple) and len(declared) in (2, 3) and declared[2:] in ((), ("log",)):
        entry = {"low": declared[0], "high": declared[1], "log": len(declared) == 3}
    else:
        raise UserError(f"strategy: searched[{name!r}]: {declared!r} is not (low, high), (low, high, 'log') or a list")
    found = read_span(f"strategy: searched[{name!r}]", entry, faults)
    if found is None:
        raise UserError(*faults)
    return found
