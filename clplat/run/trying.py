"""All faults of a configuration at once: of its keys, and what parts say of the values of those that are left."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial

from clplat.config import discovery
from clplat.config.resolve import PARTS, Refused
from clplat.config.settings import Config
from clplat.errors import UserError
from clplat.run.build import Trial, build, build_stream


@contextlib.contextmanager
def all_faults() -> Iterator[None]:
    """Where a configuration is refused within this for its keys, its parts are tried without them.

    Raises:
        UserError: one line for each fault.
    """
    try:
        yield
    except Refused as error:
        further = [fault for config in error.rest for fault in option_faults(config)]
        raise UserError(*dict.fromkeys([*error.faults, *further])) from None


def option_faults(config: Config) -> list[str]:
    """What is wrong with the values that parts are given: no more, for all else may follow from a key left out.

    Where a part is not known, no other can be built on it, and the stream alone is tried.
    """
    known = [key for key in PARTS if getattr(config, key).name]
    faults: tuple[str, ...] = ()
    try:
        if len(known) == len(PARTS):
            build(config)
        elif "stream" in known:
            trial = Trial(config)
            trial.part("stream", partial(build_stream, config), whole=False)
            trial.end()
    except UserError as error:
        faults = error.faults
    except Exception:  # noqa: BLE001 - missing data, or what a part that lacks a key can't do: told once all keys are right
        return []
    return [fault for fault in faults if fault.partition(":")[0] in _given(config, known)]


def _given(config: Config, parts: list[str]) -> set[str]:
    """The keys of parts that do not have their default."""
    found = set()
    for key in parts:
        part = getattr(config, key)
        defaults = {o.name: o.default for o in discovery.options(discovery.find(PARTS[key], part.name, config.given))}
        found |= {f"{key}.{k}" for k, value in part.options.items() if k not in defaults or value != defaults[k]}
    return found
