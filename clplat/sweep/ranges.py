"""What is searched where nobody says: the ranges that strategies declare (`Strategy.searched`)."""

from __future__ import annotations

import ast
import inspect
from typing import Any

from clplat.config import discovery, syntax
from clplat.errors import UserError
from clplat.sweep.space import Span, read_span


def spans(entry: discovery.Entry) -> dict[str, Span]:
    """Configuration key → what a sweep over this strategy searches.

    Raises:
        UserError: it declares something else than ranges and choices, or nothing.
    """
    found = {f"strategy.{name}": span(name, value) for name, value in searched(entry).items()}
    if not found:
        raise UserError(f"sweep.space: is empty, and {entry.name} declares nothing to search (give keys)")
    return found


def searched(entry: discovery.Entry) -> dict[str, Any]:
    """What a sweep over a strategy searches unless it is told: its `searched`, laid over those of its bases.

    Raises:
        UserError: it is not written in literals.
    """
    if entry.made is not None:
        found = [vars(c)["searched"] for c in inspect.getmro(_class_of(entry.made)) if "searched" in vars(c)]
    else:
        cls = syntax.find_class(syntax.read(entry.file), entry.qualname.rpartition(":")[2])
        try:
            found = [] if cls is None else [ast.literal_eval(v) for v in syntax.class_values(cls, "searched")]
        except ValueError as error:
            raise UserError(f"strategy: {entry.name}.searched is not written in literals") from error
    merged: dict[str, Any] = {}
    for layer in reversed(found):
        merged |= layer
    known = {o.name for o in discovery.options(entry)}
    return {name: value for name, value in merged.items() if value is not None and name in known}


def _class_of(part: Any) -> type:
    return part if inspect.isclass(part) else type(part)


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
