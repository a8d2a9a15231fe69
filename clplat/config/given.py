"""Objects that a run is given in Python: in a configuration stands a name, `Mine@python:<digest>`, in their place.

The name holds a digest of the object (`digest.py`), so that a resumed run, given its objects anew, is told by its
configuration alone whether they are the same. The objects themselves travel in `Config.given` and are never written.
"""

from __future__ import annotations

import inspect
import os
import re
import sys
from collections.abc import Mapping
from typing import Any

from clplat.config.digest import digest
from clplat.config.settings import Config, Part, flat

PARTS = ("stream", "strategy", "backbone", "head")
_NAME = re.compile(r"[^\s@]+@python:[0-9a-f]{12}")
_VALID = {
    "stream": "a name, a Stream, a class of streams, a benchmark of Avalanche, or {'name': 'arrays', 'train': (X, Y), "
    "'test': (X, Y)}",
    "strategy": "a name, or a class of strategies: strategy=Mine, or {'name': Mine, 'lr': 0.1}",
    "backbone": "a name, an nn.Module without its last layer, or a function of input_shape that gives one",
    "head": "a name",
}


class Given(str):
    """The name of an object given in Python; told from a text that looks like one."""


def is_given(name: Any) -> bool:
    """Whether a value of a configuration stands for an object that was given in Python."""
    return isinstance(name, str) and _NAME.fullmatch(name) is not None


def named(layer: Mapping[str, Any], held: dict[str, Any], faults: list[str]) -> dict[str, Any]:
    """`layer` of a configuration with names for the objects of its parts.

    Args:
        held: gets each object by its name.
        faults: gets a line for each that can't be taken.
    """
    found: dict[str, Any] = {}
    for key, value in layer.items():
        part = str(key).partition(".")[0]
        if part not in PARTS:
            found[key] = value
            continue
        if isinstance(value, Part):
            value = {"name": value.name, **value.options}
        if key == part == "stream" and hasattr(value, "train_stream") and hasattr(value, "test_stream"):
            value = {"name": "avalanche", "benchmark": value}
        if key == part and isinstance(value, Mapping):
            inner = {k: _part(part, v, held, faults) if k == "name" else _option(f"{part}.{k}", v, held, faults)
                     for k, v in value.items()}  # fmt: skip
            found[key] = {k: v for k, v in inner.items() if v is not _REFUSED}
        else:
            made = (_part if key == part else _option)(str(key), value, held, faults)
            found |= {key: made} if made is not _REFUSED else {}
    return found


def keys_of(config: Config) -> dict[str, str]:
    """Names of the objects of a run, by the key of the part or option that each stands for."""
    return {k.removesuffix(".name"): v for k, v in flat(config.to_dict()).items() if is_given(v)}


def absent(key: str, name: str) -> str:
    """The fault of a configuration that names an object which is not at hand."""
    what = name.partition("@")[0]
    part, _, option = key.partition(".")
    again = f"{part}={{..., {option!r}: ...}}" if option else f"{part}={what}"
    return (
        f"{key}: {name} was given in Python, so this configuration alone can't make it: go on there by "
        f"clplat.resume(RUN_DIR, {again}), or load by clplat.load(RUN_DIR, {again})"
    )


_REFUSED: Any = object()


def _part(part: str, value: Any, held: dict[str, Any], faults: list[str]) -> Any:
    if _plain(value):
        return value  # a name, or what is refused where names are looked up
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if not _fits(part, value):
        made = isinstance(value, _classes()["strategy"]) if part == "strategy" else False
        what = f"an instance of {type(value).__name__}, which holds a model already" if made else _short(value)
        faults.append(f"{part}: {what} (valid: {_VALID[part]})")
        return _REFUSED
    return _hold(part, value, held, faults)


def _option(key: str, value: Any, held: dict[str, Any], faults: list[str]) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if (numpy := sys.modules.get("numpy")) is not None and isinstance(value, numpy.generic):
        return value.item()
    return value if _plain(value) else _hold(key, value, held, faults)


def _plain(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _plain(v) for k, v in value.items())
    if isinstance(value, list | tuple):
        return all(map(_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _hold(key: str, value: Any, held: dict[str, Any], faults: list[str]) -> Any:
    try:
        name = Given(f"{_title(value)}@python:{digest(_contents(value))}")
    except (TypeError, ValueError, RuntimeError, NotImplementedError, AttributeError) as error:
        why = " ".join(str(error).split())[:160]
        faults.append(f"{key}: {_short(value)} can't be told by its content, which resuming needs ({why})")
        return _REFUSED
    held[name] = value
    return name


def _fits(part: str, value: Any) -> bool:
    base = _classes().get(part)
    if part == "backbone":
        return isinstance(value, base) or inspect.isfunction(value)  # type: ignore[arg-type]
    if isinstance(value, type):
        return base is not None and issubclass(value, base)
    return part == "stream" and isinstance(value, base)  # type: ignore[arg-type]


def _classes() -> dict[str, type]:
    """What an object for a part must be; loads torch, which whoever has such objects has loaded."""
    from torch import nn

    from clplat.strategy import Strategy
    from clplat.stream import Stream

    return {"stream": Stream, "strategy": Strategy, "backbone": nn.Module}


def _contents(value: Any) -> Any:
    """A benchmark of Avalanche by all its samples, as they are evaluated; anything else is itself."""
    if not (hasattr(value, "train_stream") and hasattr(value, "test_stream")):
        return value
    found: list[Any] = []
    for experience in (*value.train_stream, *value.test_stream):
        dataset = experience.dataset.eval() if hasattr(experience.dataset, "eval") else experience.dataset
        found += [digest([*dataset[i]][:2]) for i in range(len(dataset))]
        found.append([len(dataset), sorted(getattr(experience, "task_labels", None) or [0])])
    return found


def _title(value: Any) -> str:
    """Name of a class or function, else of the object's class."""
    name = getattr(value, "__name__", None) or type(value).__name__
    return re.sub(r"\W", "_", str(name))


def _short(value: Any) -> str:
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"a {type(value).__name__}"
