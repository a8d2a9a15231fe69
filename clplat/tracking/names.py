"""Names and values in the form that MLflow takes."""

from __future__ import annotations

import hashlib
import posixpath
import re
from collections.abc import Mapping, Sequence
from typing import Any

from clplat.files import to_json

GROUP_TAG = "clplat.group"
CUT = " … (cut; whole in config.yaml)"  # ends a parameter that was too long
_NOTE = 5000  # characters of a tag
_LONGEST = 240  # MLflow takes 250 characters; nine are the digest's


def metric_name(name: str) -> str:
    """`name` as MLflow takes it: itself, or, where it refuses or would fold it, a likeness and a digest of the whole.

    No two names share a result: what is replaced or cut is told apart by the digest.
    """
    like = re.sub(r"[^\w\-. :/]", "_", name)
    parts = [p for p in like.split("/") if p not in ("", ".", "..")]
    like = "/".join(parts)[:_LONGEST]
    if like == name == posixpath.normpath(name):
        return name
    return f"{like or '_'}.{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def shortened(value: str, most: int) -> str:
    """A parameter's value, which MLflow bounds; one that is cut says so."""
    return value if len(value) <= most else value[: most - len(CUT)] + CUT


def note_of_sets(experiences: Sequence[tuple[str, str]]) -> str:
    """The description of a run, as Markdown: what each test set is of; empty where their names say it.

    Args:
        experiences: name and title of each; an empty title: its name says it.
    """
    lines = [f"- `{name}`: {title}\n" for name, title in experiences if title]
    whole = "".join(["Test sets (`accuracy/...`, `anytime/...`):\n\n", *lines])
    end = "\n… (cut; whole in summary.json)"
    return "" if not lines else whole if len(whole) <= _NOTE else whole[: _NOTE - len(end)] + end


def group_of(name: str, params: Mapping[str, Any]) -> str:
    """What runs that differ in their seed alone share, and no others: a name, and a digest of the configuration.

    Args:
        params: the configuration, flattened.
    """
    apart = ("seed", "name", "output", "data_root")
    kept = {
        key: value
        for key, value in params.items()
        if key not in apart
        and not key.startswith(("tracking.", "audit."))
        and not (key.endswith(".seed") and value == params["seed"])
    }
    return f"{name} {hashlib.sha256(to_json(dict(sorted(kept.items()))).encode()).hexdigest()[:6]}"
