"""clplat: continual learning, unlearning, test-time adaptation and warm-started RL on one loop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clplat.api import forget as forget
    from clplat.api import load as load
    from clplat.api import resume as resume
    from clplat.api import run as run
    from clplat.metrics.record import RunRecord as RunRecord
    from clplat.run.result import Result as Result
    from clplat.strategy import Strategy as Strategy
    from clplat.strategy import require as require
    from clplat.stream import Data as Data
    from clplat.stream import Environment as Environment
    from clplat.stream import Experience as Experience
    from clplat.stream import Kind as Kind
    from clplat.stream import Stream as Stream

# Where each public name lives; imported when first asked for, so that `clplat list` never pays for torch.
_HOME = {
    "Data": "stream",
    "Environment": "stream",
    "Experience": "stream",
    "Kind": "stream",
    "Result": "result",
    "RunRecord": "record",
    "Strategy": "strategy",
    "Stream": "stream",
    "forget": "api",
    "load": "api",
    "require": "strategy",
    "resume": "api",
    "run": "api",
}
__all__ = [*sorted(_HOME), "__version__"]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clplat' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clplat.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return __all__
