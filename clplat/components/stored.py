"""What memories have in common: stored rows of tensors, their state, and the removal of what a request erases.

Shapes: n samples held or given.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clplat.components.filed import Filed
from clplat.stream import Data, Experience

CHUNK = 1024  # samples offered or compared at once


class Stored(nn.Module):
    """Rows of named tensors that follow the module's device and are saved and restored at their own size.

    Held outside PyTorch's buffers, which DDP by default sends to all processes in every forward pass.

    A bounded memory can leave its inputs in a file (`file`, a run's to set): they stand in `stored` as `Filed`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, Any] = {}  # tensors, and what stands for one
        self.file: Path | None = None
        self.goes_on = False  # whether what is restored from a checkpoint will be written to
        self.register_buffer("_here", torch.zeros(()), persistent=False)  # tells the module's device

    @property
    def nbytes(self) -> int:
        """Bytes taken by what is stored."""
        return sum(t.nbytes for t in self.stored.values())

    def __len__(self) -> int:
        raise NotImplementedError

    def _slots(self, drawn: Tensor) -> Tensor:
        """Slots of the samples numbered `drawn` (n,) int64 in [0, len)."""
        return drawn

    def _keep(self, kept: Tensor) -> None:
        """Hold only the samples numbered where `kept` (len,) is True, and nothing of the others in any slot."""
        raise NotImplementedError

    def data(self) -> Data:
        """What is held, as data to train on: inputs (len, ...) as stored, labels (len,)."""
        if not self.stored:
            raise ValueError("the memory is empty")
        slots = self._held_slots()
        return Data(self.stored["inputs"][slots], self.stored["labels"][slots])

    def joined(self, data: Data) -> Data:
        """`data` and all that is held, to train on together."""
        if not len(self):
            return data
        inputs, labels, *_ = self.everything()
        return Data(torch.cat([data.all()[0], inputs]), torch.cat([data.targets(), labels]))

    def everything(self) -> tuple[Tensor, ...]:
        """All that is held, in the order of `sample`: inputs (len, ...), labels (len,), then the extras."""
        slots = self._held_slots()
        return tuple(t.index_select(0, slots) for t in self.stored.values())

    def erase(self, request: Experience) -> int:
        """Remove what a forget experience names: all samples of its `classes`, and its own samples; returns how many.

        A sample is held if its row is; where inputs are held as the stream stores them, they must agree as well, since
        one row may have been learned in several guises (`Data.world`).

        Raises:
            ValueError: the request does not name whole classes, and the memory holds no rows.
        """
        if len(self) == 0:
            return 0
        slots = self._held_slots()
        named = torch.isin(class_ids(self.stored["labels"][slots]), torch.tensor(request.classes, device=slots.device))
        if request.train is not None and len(request.train):
            if "rows" in self.stored:
                named |= self._holds(request.train, slots)
            elif not request.classes:
                raise ValueError("this memory can't tell samples apart: add(..., rows=strategy.rows)")
        self._keep(~named)
        return int(named.sum())

    def _held_slots(self) -> Tensor:
        return self._slots(torch.arange(len(self))).to(self.stored["labels"].device)

    def _holds(self, data: Data, slots: Tensor) -> Tensor:
        """Which of `slots` (n,) hold a sample of `data`, (n,) bool."""
        rows = data.row_ids().to(slots.device)
        sorted_rows, order = rows.sort()
        mine = self.stored["rows"][slots]
        found = torch.searchsorted(sorted_rows, mine).clamp(max=len(rows) - 1)
        same = sorted_rows[found] == mine  # (n,)
        for at in same.nonzero()[:, 0].split(CHUNK):
            theirs, held = data.batch(order[found[at]].to(data.inputs.device))[0], self.stored["inputs"][slots[at]]
            if theirs.shape == held.shape:
                same[at] = _alike(theirs.to(held.device), held)
        return same

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Stored:
        super()._apply(fn, recurse)
        self.stored = {name: t if isinstance(t, Filed) else fn(t) for name, t in self.stored.items()}
        return self

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of `nbytes` that are in a file."""
        return sum(t.nbytes for t in self.filed())

    def filed(self) -> list[Filed]:
        """What of it is in a file."""
        return [t for t in self.stored.values() if isinstance(t, Filed)]

    def _state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as tensors."""
        found = dict[str, Tensor]()
        for name, t in self.stored.items():
            if isinstance(t, Filed):
                found |= {f"filed.{name}.{key}": value for key, value in t.state().items()}
            else:
                found[f"stored.{name}"] = t
        return found

    def _restore(self, state: dict[str, Tensor]) -> None:
        """Inverse of `_state`."""
        here: Tensor = self._here  # type: ignore[assignment]
        self.stored = {}
        for key, value in state.items():  # whose order is that of `sample`
            kind, _, name = key.partition(".")
            if kind == "stored":
                self.stored[name] = value.to(here.device, copy=True)
            elif kind == "filed" and (name := name.rpartition(".")[0]) not in self.stored:
                own = {k.rpartition(".")[2]: v for k, v in state.items() if k.startswith(f"filed.{name}.")}
                self.stored[name] = Filed.restored(self.file, own, go_on=self.goes_on)
        if self.file is not None and self.goes_on and not self.filed():
            self.file.unlink(missing_ok=True)  # of a run that was killed, and had not begun it by then
        if not self.goes_on:
            self.file = None  # what is learned from here on does not touch it

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination.update({prefix + name: t for name, t in self._state().items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        state = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
        needed = [name for name in self._state() if not name.startswith(("stored.", "filed."))]
        missing = [prefix + name for name in needed if name not in state]
        missing_keys.extend(missing)
        if not missing:
            self._restore(state)


def class_ids(labels: Tensor) -> Tensor:
    """Classes (n,) of labels: class ids (n,), or (n, A) token ids where answers are free text, all of one class 0."""
    return labels if labels.ndim == 1 else labels.new_zeros(len(labels))


def _alike(a: Tensor, b: Tensor) -> Tensor:
    """Which samples of a and b (n, ...) are the same, (n,) bool: up to rounding, for what a world computes."""
    if a.is_floating_point():
        same = torch.isclose(a, b.to(a.dtype), rtol=1e-4, atol=1e-4, equal_nan=True)
    else:
        same = (a.int() - b.int()).abs() <= 1 if a.dtype == torch.uint8 else a == b
    return same.flatten(1).all(1)
