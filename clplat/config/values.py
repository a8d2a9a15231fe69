"""Checks values of a configuration against the types of their options."""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal

from clplat.config.discovery import did_you_mean
from clplat.config.given import Given
from clplat.config.syntax import REQUIRED, Option

_PLAIN = (type(None), bool, int, float, str, list, tuple, dict)
_WORDS: dict[Any, str] = {
    int: "an int",
    float: "a float",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "any value",
}


def typed(
    options: Mapping[str, Option],
    given: Mapping[str, Any],
    faults: list[str],
    near: Callable[[str], str],
    *,
    prefix: str = "",
) -> dict[str, Any]:
    """What is given, as its options' types; adds a line to `faults` for each key that is unknown, wrong or missing.

    Args:
        near: what to say of an unknown key after "no such key".
        prefix: of the keys in `faults`.
    """
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in options:
            faults.append(f"{prefix}{key}: no such key{near(key)}")
            continue
        try:
            values[key] = parse_value(options[key], value)
        except ValueError as error:
            faults.append(f"{prefix}{key}: {error}")
    for key, option in options.items():
        if option.default is REQUIRED and key not in given:
            faults.append(f"{prefix}{key}: is required{' (' + option.help + ')' if option.help else ''}")
    return values


def parse_value(option: Option, value: Any) -> Any:
    """A value as its option's type: text from a flag or plain values from YAML.

    Raises:
        ValueError: "'abc' is not a float".
    """
    import jsonargparse

    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, _PLAIN):
        raise ValueError(f"{value!r} is no plain value")
    if option.type is Any:
        return value
    if isinstance(value, Given):
        if all(m in _WORDS or typing.get_origin(m) is not None or m in _PLAIN for m in _members(option.type)):
            raise ValueError(f"{value.partition('@')[0]} is not {describe(option.type)}")
        return value
    if value is None and not _admits_none(option.type):
        raise ValueError(f"null is not {describe(option.type)}")
    if value is True and bool not in _members(option.type):
        raise ValueError(f"needs a value, {describe(option.type)}")
    text = value if isinstance(value, str) else json.dumps(value)
    jsonargparse.set_parsing_settings(import_path_allowlist=["clplat"])
    parser = jsonargparse.ArgumentParser(exit_on_error=False, add_help=False)
    try:
        parser.add_argument("--value", type=option.type)
        parsed = parser.parse_args([f"--value={text}"]).value
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise ValueError(f"{value!r} is not {describe(option.type)}{_nearest_literal(option.type, value)}") from error
    if not isinstance(parsed, _PLAIN):
        raise ValueError("can't be set from a configuration")
    return parsed


def describe(type_: Any) -> str:
    """A type in words: "an int or null"."""
    words = []
    for member in _members(type_):
        if typing.get_origin(member) is Literal:
            words.append("one of " + ", ".join(str(a) for a in typing.get_args(member)))
        else:
            name = str(member) if typing.get_args(member) else getattr(member, "__name__", str(member))
            words.append(_WORDS.get(member) or "a " + name.replace("typing.", ""))
    return " or ".join(words)


def _members(type_: Any) -> tuple[Any, ...]:
    union = typing.get_origin(type_) in (typing.Union, types.UnionType)
    return typing.get_args(type_) if union else (type_,)


def _admits_none(type_: Any) -> bool:
    return type(None) in _members(type_)


def _nearest_literal(type_: Any, value: Any) -> str:
    valid = [str(a) for m in _members(type_) if typing.get_origin(m) is Literal for a in typing.get_args(m)]
    return did_you_mean(str(value), valid, n=1) if valid else ""
