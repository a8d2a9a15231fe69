"""The conformance suite's stream of all that a strategy declares, by names that a configuration can hold."""

from __future__ import annotations

from clplat import Kind
from clplat.testing.streams import TinyStream


class Tiny(TinyStream):
    """A tiny stream, longer than the suite's own so that there is something to kill.

    Args:
        kinds: of the strategy, joined by commas.
        repeat: so many times the samples, ≥ 1.
        seed: of the samples.
    """

    def __init__(self, *, kinds: str, repeat: int = 2, seed: int = 0, data_root: str | None = None) -> None:
        super().__init__({Kind(k) for k in kinds.split(",")}, seed=seed, repeat=repeat)
