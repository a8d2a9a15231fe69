"""Which launcher, as it is asked for."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from clplat.errors import UserError
from clplat.launchers.jobs import Launcher, Outcomes
from clplat.launchers.local import local
from clplat.launchers.ray import RESOURCES, ray
from clplat.launchers.slurm import slurm

LAUNCHERS: dict[str, Launcher] = {"local": local, "slurm": slurm, "ray": ray}
_KNOWN: dict[str, Sequence[str]] = {"local": (), "ray": RESOURCES}  # SLURM's are submitit's to know

Launch = Callable[..., Outcomes]
"""(jobs, told=...) → outcomes."""


def chosen(name: str, count: int, resources: Mapping[str, Any] | Sequence[str], counted: str = "jobs") -> Launch:
    """The launcher of this name, for `count` jobs at a time, each of which has these resources.

    Args:
        resources: or KEY=VALUE of each, values as in YAML.
        counted: what the count is called.

    Raises:
        UserError: one line for each fault.
    """
    faults = [] if name in LAUNCHERS else [f"launcher: {name!r} is not known (valid: {', '.join(LAUNCHERS)})"]
    faults += [] if count >= 1 else [f"{counted}: {count} is out of range (valid: ≥ 1)"]
    found = dict(resources) if isinstance(resources, Mapping) else _read(resources, faults)
    if name in _KNOWN:
        valid = ", ".join(_KNOWN[name]) or "none: it has what this machine has"
        other = sorted(found.keys() - set(_KNOWN[name]))
        faults += [f"resource: {name} knows no {key} (valid: {valid})" for key in other]
    if faults:
        raise UserError(*faults)
    return functools.partial(LAUNCHERS[name], count=count, resources=found)


def _read(given: Sequence[str], faults: list[str]) -> dict[str, Any]:
    found = {}
    for text in given:
        key, _, value = text.partition("=")
        try:
            found[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            faults.append(f"resource: {key}: {value!r} is not YAML")
        if not value:
            faults.append(f"resource: {text!r} is not KEY=VALUE")
    return found
