"""Options of a part within a part: `stream.base` names a stream within a stream, `stream.base_options` holds its
options; likewise `backbone.base`.

Checked like any part's own options, from the syntax tree, before anything is imported: unknown keys with the nearest
ones, types, what is required.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from clplat.config import discovery
from clplat.config.given import is_given
from clplat.config.syntax import Option
from clplat.config.values import typed
from clplat.errors import UserError

GROUPS = {"stream": "streams", "backbone": "backbones"}


def check_nested(
    keys: Mapping[str, Option], values: dict[str, Any], held: Mapping[str, Any], faults: list[str]
) -> None:
    """Put the inner parts' options in `values` into their types; add a line to `faults` for each that is wrong.

    Args:
        keys: all options of the run, dotted; nothing is done where a part takes no other.
        values: those that are set; a name that is a path is made absolute, so that the configuration can move.
        held: objects given in Python, by name.
    """
    for part in GROUPS:
        if {f"{part}.base", f"{part}.base_options"} <= keys.keys():
            _check(part, keys, values, held, faults)


def _check(
    part: str, keys: Mapping[str, Option], values: dict[str, Any], held: Mapping[str, Any], faults: list[str]
) -> None:
    base, options = f"{part}.base", f"{part}.base_options"
    name, given = values.get(base, keys[base].default), values.get(options) or {}
    if not isinstance(name, str) or not isinstance(given, Mapping):
        return  # found wrong elsewhere
    if is_given(name) and not isinstance(held.get(name), type):
        return  # a finished stream from Python, or one that is absent
    try:
        entry = discovery.find(GROUPS[part], name, held)
        if entry.fault:
            raise UserError(f"{part}: '{name}' can't be used: {entry.fault}")
        known = {o.name: o for o in discovery.options(entry)}
    except UserError as error:
        faults += [f.replace(f"{part}:", f"{base}:", 1) for f in error.faults]
        return
    if ".py" in name and entry.qualname.startswith("/"):
        values[base] = entry.qualname
    if part == "stream":
        known["seed"] = Option("seed", int | None, None, "of the base alone")
    takes = f" ({name} takes: {', '.join(known)})"
    found = typed(
        known,
        {str(key): value for key, value in given.items()},
        faults,
        lambda key: discovery.did_you_mean(key, known) or takes,
        prefix=f"{options}.",
    )
    if options in values:
        values[options] = found
