"""Help on the keys of a configuration: what `clplat run --help` shows, read from docstrings."""

from __future__ import annotations

import shutil
import textwrap
import types
import typing
from collections.abc import Iterable
from typing import Any, Literal

from clplat.config import discovery
from clplat.config.resolve import DEFAULTS, PARTS, SECTIONS, section_options
from clplat.config.syntax import REQUIRED, Option

_TITLES = {
    "loop": "the loop over the stream",
    "fabric": "devices and precision",
    "start": "weights to start from",
    "audit": "what is measured about requests to forget",
    "tracking": "MLflow",
}


def keys_help(parts: dict[str, str]) -> str:
    """All general keys and those of the parts given (key → name), in sections.

    Raises:
        UserError: an unknown part.
    """
    blocks = []
    lines = []
    for key, group in PARTS.items():
        names = ", ".join(discovery.entries(group)) or "none found"
        lines += _entry(f"--{key} NAME", f"{names}; or path/to/file.py:Name", DEFAULTS.get(key, REQUIRED))
    blocks.append(
        "\n".join(["parts (their options are shown when they are named: `clplat run --strategy er --help`):", *lines])
    )
    for key, name in parts.items():
        entry = discovery.find(PARTS[key], name)
        about = " ".join(filter(None, [entry.summary, f"[{entry.paper}]" if entry.paper else ""]))
        options = discovery.options(entry)
        shown = [line for o in options for line in _option(f"{key}.", o)] or ["  (no options)"]
        blocks.append("\n".join([f"{key} {name}: {about}", *shown]))
    blocks.append("\n".join(["the run:", *(line for o in section_options(None) for line in _option("", o))]))
    for section in SECTIONS:
        lines = [line for o in section_options(section) for line in _option(f"{section}.", o)]
        blocks.append("\n".join([f"{_TITLES[section]}:", *lines]))
    return "\n\n".join(blocks) + "\n"


def _option(prefix: str, option: Option) -> list[str]:
    return _entry(f"--{prefix}{option.name} {_type_name(option.type)}", option.help, option.default)


def _entry(head: str, text: str, default: Any) -> list[str]:
    """A flag and, indented below it, what it does."""
    ending = "required" if default is REQUIRED else f"default: {_shown(default)}"
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    body = f"{text.rstrip('.')} ({ending})" if text else f"({ending})"
    return [f"  {head}", *textwrap.wrap(body, width, initial_indent=" " * 8, subsequent_indent=" " * 8)]


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return str(list(value)) if isinstance(value, tuple) else str(value) if value != {} else "{}"


def _type_name(type_: Any) -> str:
    if typing.get_origin(type_) is Literal:
        return "{" + ",".join(str(a) for a in typing.get_args(type_)) + "}"
    if typing.get_origin(type_) in (typing.Union, types.UnionType):
        return "|".join(dict.fromkeys(_type_name(m) for m in _sorted(typing.get_args(type_))))
    if type_ is type(None):
        return "null"
    if typing.get_origin(type_) is not None:
        return str(type_).replace("typing.", "").replace("collections.abc.", "").upper()
    return getattr(type_, "__name__", str(type_)).upper()


def _sorted(members: Iterable[Any]) -> list[Any]:
    return sorted(members, key=lambda m: m is type(None))
