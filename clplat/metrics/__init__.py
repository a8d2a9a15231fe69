"""Metrics of a run: what each one is (`catalogue`), and its computation from a `RunRecord`.

May import the contract. Importing this package loads neither torch nor numpy: names are fetched when asked for.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from clplat.metrics.catalogue import METRICS, MetricInfo
    from clplat.metrics.summary import per_experience, summarize

_HOME = {"METRICS": "catalogue", "MetricInfo": "catalogue", "per_experience": "summary", "summarize": "summary"}
__all__ = ["METRICS", "MetricInfo", "per_experience", "summarize"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'clplat.metrics' has no attribute {name!r}")
    return getattr(importlib.import_module(f"clplat.metrics.{_HOME[name]}"), name)
