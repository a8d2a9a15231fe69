"""Parts and options of a run as objects: made by name, or given in Python, and then a copy for each run."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Callable
from functools import wraps
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import nn

from clplat.backbones._wrapped import wrapped
from clplat.config import discovery
from clplat.config.given import is_given
from clplat.config.resolve import PARTS
from clplat.config.settings import Config
from clplat.data.datasets import in_root
from clplat.errors import UserError
from clplat.stream import Stream


def maker(config: Config, key: str) -> Any:
    """What makes a part of a run: of a strategy or head its class, of a stream or backbone a function."""
    name = getattr(config, key).name
    if not is_given(name):
        made = discovery.load(PARTS[key], name)
        return _rooted(made, config.data_root) if key in ("stream", "backbone") else made
    made = discovery.find(PARTS[key], name, config.given).made
    if isinstance(made, Stream):
        return lambda *, seed, data_root: own(made)
    if isinstance(made, nn.Module):
        return lambda input_shape: wrapped(own(made), input_shape)
    if key == "backbone":
        return lambda input_shape, **options: wrapped(_module(made, input_shape, options), input_shape)
    return made


def _rooted(make: Callable[..., Any], data_root: str | None) -> Callable[..., Any]:
    """`make`, which finds weights and tokenizers below the configuration's data root."""

    @wraps(make)
    def rooted(*args: Any, **options: Any) -> Any:
        with in_root(data_root):
            return make(*args, **options)

    return rooted


def real(config: Config, options: dict[str, Any]) -> dict[str, Any]:
    """Options of a part with the objects in the place of their names."""
    return {k: own(config.given[v]) if is_given(v) else v for k, v in options.items()}


def own(value: Any) -> Any:
    """A run's own copy of an object: a network is trained, a stream moved to its device. Data are shared."""
    if isinstance(value, nn.Module):
        return copy.deepcopy(value)
    if isinstance(value, Stream):
        data = [d for e in value for d in (e.train, e.test, e.valid, e.probe) if d is not None]
        return copy.deepcopy(value, {id(d): d for d in data})
    return value


def check_travels(config: Config) -> None:
    """Refuse to start processes that can't be given the objects of a run.

    Raises:
        UserError: names the first of them.
    """
    main = sys.modules["__main__"]
    for name, value in config.given.items():
        session = _home(value) == "__main__" and not hasattr(main, "__file__")
        why = "it is written in a session or a notebook" if session else ""
        try:
            ForkingPickler.dumps(value)
        except Exception as error:  # noqa: BLE001 - whatever it is, it can't be sent
            why = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        if why:
            fault = f"fabric.devices: {config.fabric.devices}, but {name} can't be sent to another process ({why})"
            raise UserError(f"{fault} (valid: 1, or what is written in a file that is imported)")


def _home(value: Any) -> str:
    """The module that the code of an object is in."""
    return str(getattr(value if hasattr(value, "__name__") else type(value), "__module__", ""))


def _module(made: Any, input_shape: tuple[int, ...], options: dict[str, Any]) -> nn.Module:
    """What the user's function gives."""
    takes = inspect.signature(made).parameters
    if "input_shape" not in takes:
        raise UserError(f"backbone: {made.__name__} takes no input_shape (valid: a function of input_shape)")
    net = made(input_shape=input_shape, **options)
    if not isinstance(net, nn.Module):
        raise UserError(f"backbone: {made.__name__} gives a {type(net).__name__} (valid: an nn.Module)")
    return net
