"""What each row of the accuracy matrix tells by itself, worked out once: a long run is asked after every experience."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from clplat.metrics.matrix import Matrix
from clplat.metrics.unlearning import Request, kept_accuracy, pooled_accuracy


class Rows:
    """Arrays of n + 1 rows and E columns that grow with the matrix; a row taken in is taken to stay as it is."""

    def __init__(self) -> None:
        self._count, self._last = 0, list[float | None]()
        self._scores, self._kept = np.empty((0, 0)), np.empty((0, 0))
        self._active, self._pooled = np.zeros((0, 0), dtype=bool), np.empty(0)

    def take(self, matrix: list[list[float | None]], width: int, sizes: Mapping[int, int], requests: Sequence[Request]
             ) -> None:  # fmt: skip
        """Take in the rows that are new.

        Args:
            matrix: of the record; another one than before is taken in from its first row.
            width: E.
            sizes: test samples of each learned test set, by index.
            requests: all done so far.
        """
        same = self._scores.shape[1] == width and self._count <= len(matrix)
        if not (self._count and same and matrix[self._count - 1] is self._last):
            self._count = 0
            self._scores, self._kept = np.empty((width + 1, width)), np.empty((width + 1, width))
            self._active, self._pooled = np.zeros((width + 1, width), dtype=bool), np.empty(width + 1)
        for i in range(self._count, len(matrix)):
            self._scores[i] = self._kept[i] = np.array(matrix[i], dtype=float)  # None is NaN
            learned, asked = {j: n for j, n in sizes.items() if j < i}, [q for q in requests if q.index < i]
            self._pooled[i] = pooled_accuracy(self._scores[i], asked, learned)
            kept = kept_accuracy(self._scores[i], asked, learned)
            self._kept[i, list(kept)], self._active[i, list(kept)] = list(kept.values()), True
        self._count = len(matrix)
        self._last = matrix[-1] if matrix else []

    @property
    def scores(self) -> Matrix:
        """R, NaN where not measured."""
        return self._scores[: self._count]

    @property
    def kept(self) -> Matrix:
        """R with each learned test set's accuracy on what is not erased by that row."""
        return self._kept[: self._count]

    @property
    def active(self) -> NDArray[np.bool_]:
        """Test sets learned by that row and not erased as a whole."""
        return self._active[: self._count]

    @property
    def pooled(self) -> NDArray[Any]:
        """(n + 1,) accuracy of a row over all test samples learned by it and not erased."""
        return self._pooled[: self._count]
