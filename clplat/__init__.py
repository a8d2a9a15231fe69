"""clplat: continual learning, unlearning, test-time adaptation and warm-started RL on one loop."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clplat.package import Moved, __version__

if TYPE_CHECKING:
    from clplat.api import compare as compare
    from clplat.api import export as export
    from clplat.api import forget as forget
    from clplat.api import load as load
    from clplat.api import memorisation as memorisation
    from clplat.api import report as report
    from clplat.api import resume as resume
    from clplat.api import run as run
    from clplat.commands.list import Listing as Listing
    from clplat.commands.list import listed as list  # noqa: F401 - kept out of `__all__`
    from clplat.components.ema import EMA as EMA
    from clplat.components.ema import Frozen as Frozen
    from clplat.components.gradients import second_gradient as second_gradient
    from clplat.components.memory import ClassBalanced as ClassBalanced
    from clplat.components.memory import Reservoir as Reservoir
    from clplat.components.per_parameter import PerParameter as PerParameter
    from clplat.components.per_parameter import trainable as trainable
    from clplat.errors import ClplatError as ClplatError
    from clplat.errors import CodeError as CodeError
    from clplat.errors import DivergedError as DivergedError
    from clplat.errors import Interrupted as Interrupted
    from clplat.errors import MissingError as MissingError
    from clplat.errors import UserError as UserError
    from clplat.metrics.record import RunRecord as RunRecord
    from clplat.run.learner import Learner as Learner
    from clplat.run.learner import Predictions as Predictions
    from clplat.run.result import Result as Result
    from clplat.run.result import Results as Results
    from clplat.strategy import Strategy as Strategy
    from clplat.strategy import require as require
    from clplat.stream import Data as Data
    from clplat.stream import Environment as Environment
    from clplat.stream import Experience as Experience
    from clplat.stream import Kind as Kind
    from clplat.stream import Stream as Stream
    from clplat.sweep.study import sweep as sweep

# Where each public name lives; imported when first asked for, so that `clplat list` never pays for torch.
_HOME = {
    "ClassBalanced": "components.memory",
    "ClplatError": "errors",
    "CodeError": "errors",
    "Data": "stream",
    "DivergedError": "errors",
    "EMA": "components.ema",
    "Environment": "stream",
    "Experience": "stream",
    "Frozen": "components.ema",
    "Interrupted": "errors",
    "Kind": "stream",
    "Learner": "run.learner",
    "Listing": "commands.list",
    "MissingError": "errors",
    "PerParameter": "components.per_parameter",
    "Predictions": "run.learner",
    "Reservoir": "components.memory",
    "Result": "run.result",
    "Results": "run.result",
    "RunRecord": "metrics.record",
    "Strategy": "strategy",
    "Stream": "stream",
    "UserError": "errors",
    "compare": "api",
    "export": "api",
    "forget": "api",
    "list": "commands.list:listed",
    "load": "api",
    "memorisation": "api",
    "report": "report",
    "require": "strategy",
    "resume": "api",
    "run": "run",
    "second_gradient": "components.gradients",
    "sweep": "sweep",
    "trainable": "components.per_parameter",
}
__all__ = [*sorted(_HOME.keys() - {"list"}), "__version__"]  # noqa: PLE0604 - `import *` leaves Python's own list


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clplat' has no attribute {name!r}")
    where, _, inside = _HOME[name].partition(":")
    home = importlib.import_module(f"clplat.{where}")
    return home if where == name else getattr(home, inside or name)  # a room that can be called, or what is in it


def __dir__() -> Sequence[str]:
    return sorted([*__all__, "list"])


sys.meta_path.append(Moved)
