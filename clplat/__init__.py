"""clplat: continual learning, unlearning, test-time adaptation and warm-started RL on one loop."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from clplat.api import forget as forget
    from clplat.api import load as load
    from clplat.api import resume as resume
    from clplat.api import run as run
    from clplat.components.ema import EMA as EMA
    from clplat.components.ema import Frozen as Frozen
    from clplat.components.memory import ClassBalanced as ClassBalanced
    from clplat.components.memory import Reservoir as Reservoir
    from clplat.components.per_parameter import PerParameter as PerParameter
    from clplat.errors import ClplatError as ClplatError
    from clplat.errors import DivergedError as DivergedError
    from clplat.errors import Interrupted as Interrupted
    from clplat.errors import MissingError as MissingError
    from clplat.errors import UserError as UserError
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
    "ClassBalanced": "components.memory",
    "ClplatError": "errors",
    "Data": "stream",
    "DivergedError": "errors",
    "EMA": "components.ema",
    "Environment": "stream",
    "Experience": "stream",
    "Frozen": "components.ema",
    "Interrupted": "errors",
    "Kind": "stream",
    "MissingError": "errors",
    "PerParameter": "components.per_parameter",
    "Reservoir": "components.memory",
    "Result": "run.result",
    "RunRecord": "metrics.record",
    "Strategy": "strategy",
    "Stream": "stream",
    "UserError": "errors",
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


class Door(ModuleType):
    """A room that shares its name with a function of the API: `clplat.run(...)` and `clplat.run.build` are both."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module("clplat.api"), self.__name__.rpartition(".")[2])(*args, **options)


class _Moved:
    """Says what a module of 0.1.0 became: those that stood side by side in `clplat/` are in rooms now."""

    rooms = {  # noqa: RUF012
        "adapters": "",
        "backbones": "answering heads",
        "components": "ema frozen generated hypernetwork lookahead losses memory per_parameter ridge stored",
        "config": "discovery nested settings syntax values",
        "data": "batches corruptions datasets scenarios splits tokens worlds",
        "erasure": "audit counterfactual late ledger requests",
        "metrics": "record",
        "report": "compare",
        "run": "build checkpoint display evaluation interaction launch measurement online progress result rundir "
        "runlog runner schedule snapshot start summary",
        "tracking": "charts server store",
    }

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> None:
        """Raise for a module that moved; anything else is left to the other finders."""
        package, _, module = name.rpartition(".")
        room = next((r for r, modules in cls.rooms.items() if module in modules.split()), None)
        if package == __name__ and room is not None:
            raise ModuleNotFoundError(f"{name} is clplat.{room}.{module} now", name=name)


sys.meta_path.append(_Moved)
