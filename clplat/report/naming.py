"""Names of what a report shows side by side: no two alike, and what sets them apart in them. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from clplat.config.resolve import experiments

_MOST_KEYS = 3
_LONGEST = 32


def short_name(part: Any) -> str:
    """A part's name; of one from a file, `file.py:Class` without the folders."""
    name = str(part)
    return name.replace("\\", "/").rsplit("/", 1)[-1] if ".py:" in name else name


def own_name(config: Mapping[str, Any]) -> str | None:
    """The key under `runs:` that a run was made by, which ends its name; None for a run that has none."""
    name = config.get("name")
    if not isinstance(name, str) or "/" not in name or name in experiments():
        return None
    return name.rpartition("/")[2]


def labels(names: Sequence[str], facts: Sequence[Mapping[str, Any]]) -> list[str]:
    """`names`, those that several share with what sets these apart: "er (memory 50)".

    Args:
        facts: of each, dotted keys to plain values. Of more than three keys that differ, those with most values.
    """
    found: list[str] = []
    for name, own in zip(names, facts, strict=True):
        rivals = [other for other, its in zip(facts, names, strict=True) if its == name]
        values = {key: {repr(other.get(key, ...)) for other in rivals} for key in own}
        apart = [key for key in own if len(values[key]) > 1]
        if len(apart) > _MOST_KEYS:
            kept = sorted(apart, key=lambda key: -len(values[key]))[:_MOST_KEYS]
            apart = [key for key in apart if key in kept]
        shown = ", ".join(f"{_short(key)} {_value(own[key])}" for key in apart)
        label = f"{name} ({shown})" if shown else name
        if label in found:
            label = next(f"{label} #{i}" for i in range(2, len(names) + 2) if f"{label} #{i}" not in found)
        found.append(label)
    return found


def cut(content: str, length: int) -> str:
    """`content` in at most `length` characters."""
    return content if len(content) <= length else content[: max(1, length - 1)] + "…"


def cut_apart(contents: Sequence[str], length: int) -> list[str]:
    """Each in at most `length` characters, still different where they were: of those that would look alike, the end.

    Where the ends are alike too they are numbered.
    """
    found = [cut(c, length) for c in contents]
    for i, content in enumerate(contents):
        alike = [j for j, other in enumerate(contents) if other != content and cut(other, length) == found[i]]
        if alike and len(content) > length:
            head = max(1, length // 3)
            found[i] = content[:head] + "…" + content[head + 1 - length :]
    for i, content in enumerate(contents):
        if any(found[j] == found[i] and contents[j] != content for j in range(i)):
            number = f" #{i + 1}"
            found[i] = cut(content, length - len(number)) + number
    return found


def _short(key: str) -> str:
    """strategy.memory → memory; backbone.name → backbone."""
    parts = key.split(".")
    return parts[-2] if parts[-1] == "name" and len(parts) > 1 else parts[-1]


def _value(value: Any) -> str:
    """As YAML has it; of a long text its end, which tells files of one name apart."""
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= _LONGEST else "…" + text[1 - _LONGEST :]
