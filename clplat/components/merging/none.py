"""No merge: the weights stay as they were learned."""

from __future__ import annotations

from clplat.components.merging._base import Merge


class Unmerged(Merge):
    """Leaves the weights as they were learned."""

    def __init__(self) -> None:
        super().__init__(skip=0)
