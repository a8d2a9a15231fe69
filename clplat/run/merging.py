"""What is done to trained weights when an experience ends: made of its options, and checked against the other parts."""

from __future__ import annotations

from typing import Any

from clplat.components.merging._base import Merge
from clplat.config.settings import Config
from clplat.run.given import maker, real
from clplat.strategy import Strategy
from clplat.stream import Kind, Stream


def build_merge(config: Config, options: dict[str, Any] | None = None) -> Merge:
    """What is done to the weights when a learn experience ends. `options` stand for those of `config`."""
    return maker(config, "merge")(**(real(config, config.merge.options) if options is None else options))


def merge_faults(name: str, merge: Merge, strategy: Strategy, stream: Stream) -> list[str]:
    """Why a merge has no meaning for this strategy, or nothing to do on this stream."""
    learner, learned = type(strategy).__name__, [e.index for e in stream if e.kind is Kind.LEARN]
    if strategy.unmergeable:
        return [f"merge: {name} has no meaning for {learner}: {strategy.unmergeable} (valid: none)"]
    if strategy.factored and not merge.by_factors:
        what = f"{learner} trains factors of a change, and {name} is defined for the change itself"
        return [f"merge: {what} (valid: none, dynamic_ema)"]
    if not any(index >= merge.skip for index in learned):
        return [
            f"merge: {name} has nothing to do: no learn experience comes after the first {merge.skip} (valid: none)"
        ]
    return merge.faults(strategy)
