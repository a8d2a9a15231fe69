"""What the package itself is made of: its version, rooms that can be called, and where former modules are now."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

__version__ = "0.1.0"


class Door(ModuleType):
    """A room that shares its name with a function of the API: `clplat.run(...)` and `clplat.run.build` are both.

    Its `function_in` is the module where that function is.
    """

    def __call__(self, *args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(self.function_in), self.__name__.rpartition(".")[2])(*args, **options)


class Moved:
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
        "run": "build checkpoint display evaluation interaction launch online progress result rundir "
        "runlog schedule start summary",
        "tracking": "charts server store",
    }

    @classmethod
    def find_spec(cls, name: str, path: Any = None, target: Any = None) -> None:
        """Raise for a module that moved; anything else is left to the other finders."""
        package, _, module = name.rpartition(".")
        room = next((r for r, modules in cls.rooms.items() if module in modules.split()), None)
        if package == "clplat" and room is not None:
            raise ModuleNotFoundError(f"{name} is clplat.{room}.{module} now", name=name)
