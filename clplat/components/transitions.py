"""A replay memory of transitions: rows of one tensor, drawn in one indexing call.

Shapes: S slots, n transitions, B of a batch, w numbers of a row (`clplat.data.transitions`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from clplat.components.stored import Stored
from clplat.strategy import require


class TransitionMemory(Stored):
    """The last `size` transitions, in a ring.

    Args:
        size: S ≥ 1.
        actions: a, numbers of an action, which tells the parts of a row.

    Room is made as rows come, by doubling: the bytes of a checkpoint follow what is held.
    """

    def __init__(self, size: int, actions: int) -> None:
        super().__init__()
        require("memory", size, size >= 1, "≥ 1")
        self.size, self.actions, self.held, self.at = size, actions, 0, 0

    def __len__(self) -> int:
        return self.held

    def add(self, rows: Tensor) -> None:
        """Put rows (n, w) behind those held; the oldest give way."""
        rows = rows.detach()[-self.size :].to(self._here.device)  # type: ignore[arg-type]
        self._make_room(min(self.size, self.held + len(rows)), rows)
        slots = (self.at + torch.arange(len(rows), device=rows.device)) % self.size
        self.stored["rows"].index_copy_(0, slots, rows)
        self.at = (self.at + len(rows)) % self.size
        self.held = min(self.size, self.held + len(rows))

    def _make_room(self, needed: int, like: Tensor) -> None:
        room = len(self.stored["rows"]) if self.stored else 0
        if room < needed:
            grown = like.new_zeros(min(self.size, max(needed, 2 * room, 256)), like.shape[1])
            if room:
                grown[:room] = self.stored["rows"]
            self.stored["rows"] = grown

    def sample(self, n: int, newest: int | None = None) -> Tensor:
        """n rows (n, w) drawn uniformly, with replacement, by torch's generator; of the `newest` alone, if so many are
        held.

        Raises:
            ValueError: nothing is held.
        """
        if self.held == 0:
            raise ValueError("the memory is empty")
        drawn = torch.randint(self.held if newest is None else min(newest, self.held), (n,))
        if newest is not None:
            drawn = (self.at - 1 - drawn) % self.size
        return self.stored["rows"].index_select(0, drawn.to(self.stored["rows"].device))

    def clear(self) -> None:
        """Hold nothing."""
        self.stored, self.held, self.at = {}, 0, 0

    def _keep(self, kept: Tensor) -> None:
        raise NotImplementedError("transitions are not erased one by one")

    def _state(self) -> dict[str, Tensor]:
        return {"counts": torch.tensor([self.held, self.at]), **super()._state()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        super()._restore(state)
        self.held, self.at = state["counts"].tolist()
