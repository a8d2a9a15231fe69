"""Memories of past samples: a uniform reservoir, a class-balanced one, and everything seen.

A memory keeps inputs as the stream stores them (`strategy.raw`: before normalisation and augmentation), so that a
replayed sample is prepared, and augmented, anew. Its state is in `state_dict()`: what it holds, its counters and the
state of its own random generator; it takes its size from the state on loading, so that a resumed run goes on bit for
bit. It is held outside PyTorch's buffers, which DDP by default sends to all processes in every forward pass.

Under DDP every process passes its part of the global batch to `add`, in order of rank; all processes then hold the
same samples and the same generator, and `sample(n)` gives each of them its own n of one draw of n · world_size. So
P processes with batches of B equal one process with batches of P · B. With one process nothing is communicated.

Shapes: B samples of a batch, M replayed, S slots, n samples drawn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from clplat.strategy import require


class _Stored(nn.Module):
    """Rows of named tensors that follow the module's device and are saved and restored at their own size."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[str, Tensor] = {}
        self.register_buffer("_here", torch.zeros(()), persistent=False)  # tells the module's device

    @property
    def nbytes(self) -> int:
        """Bytes taken by what is stored."""
        return sum(t.nbytes for t in self.stored.values())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> _Stored:
        super()._apply(fn, recurse)
        self.stored = {name: fn(t) for name, t in self.stored.items()}
        return self

    def _state(self) -> dict[str, Tensor]:
        """Everything needed to go on, as tensors."""
        return {f"stored.{name}": t for name, t in self.stored.items()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        """Inverse of `_state`."""
        here: Tensor = self._here  # type: ignore[assignment]
        rows = {k.removeprefix("stored."): v for k, v in state.items() if k.startswith("stored.")}
        self.stored = {name: t.to(here.device, copy=True) for name, t in rows.items()}

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
        needed = [name for name in self._state() if not name.startswith("stored.")]
        missing = [prefix + name for name in needed if name not in state]
        missing_keys.extend(missing)
        if not missing:
            self._restore(state)


class Archive(_Stored):
    """Everything that was put in it, without bound. For upper bounds (`joint`, `cumulative`), which break the rules of
    continual learning on purpose."""

    def extend(self, inputs: Tensor, labels: Tensor) -> None:
        """Append inputs (n, ...) and labels (n,). Every process passes the same rows."""
        for name, rows in (("inputs", inputs), ("labels", labels)):
            self.stored[name] = torch.cat([self.stored[name], rows]) if name in self.stored else rows.clone()

    def __len__(self) -> int:
        return len(self.stored["labels"]) if self.stored else 0


class _Bounded(_Stored):
    """At most `size` samples; a subclass decides who goes where.

    Args:
        size: samples kept in all, ≥ 1.
        seed: of its own generator; None takes torch's seed. Must be the same on all processes.
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__()
        require("memory", size, size >= 1, "≥ 1")
        self.size = size
        self.generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)

    def __len__(self) -> int:
        raise NotImplementedError

    def _place(self, labels: Tensor) -> dict[int, int]:
        """Slot → position in the batch, of those that are kept. Counts the batch as seen."""
        raise NotImplementedError

    def _slots(self, drawn: Tensor) -> Tensor:
        """Slots of the samples numbered `drawn` (n,) int64 in [0, len)."""
        return drawn

    def add(self, inputs: Tensor, labels: Tensor, **extras: Tensor) -> None:
        """Offer a batch: inputs (B, ...), labels (B,) int64 and, always under the same names, extras (B, ...).

        Where the last dimension of an extra has grown (logits of a growing head), samples stored before hold NaN in
        the new columns.
        """
        batch = {name: t.detach() for name, t in {"inputs": inputs, "labels": labels, **extras}.items()}
        if _world_size() > 1:
            batch = _gather(batch)
        if not self.stored:
            self.stored = {name: t.new_zeros((self.size, *t.shape[1:])) for name, t in batch.items()}
        elif self.stored.keys() != batch.keys():
            raise ValueError(f"this memory holds {list(self.stored)}, got {list(batch)}")
        slots = self._place(batch["labels"])
        if not slots:
            return
        device = inputs.device
        to, source = torch.tensor(list(slots), device=device), torch.tensor(list(slots.values()), device=device)
        for name, rows in batch.items():
            if name in extras and rows.ndim > 1 and (wider := rows.shape[-1] - self.stored[name].shape[-1]) > 0:
                self.stored[name] = nn.functional.pad(self.stored[name], (0, wider), value=float("nan"))
            self.stored[name].index_copy_(0, to, rows.index_select(0, source))

    def sample(self, n: int) -> tuple[Tensor, ...]:
        """Draw n of the held samples uniformly, with replacement: inputs (n, ...), labels (n,), then the extras.

        Under DDP n per process. Raises ValueError when nothing is held.
        """
        if len(self) == 0:
            raise ValueError("the memory is empty")
        world = _world_size()
        drawn = torch.randint(len(self), (n * world,), generator=self.generator)
        if world > 1:
            drawn = drawn[n * torch.distributed.get_rank() :][:n]
        slots = self._slots(drawn).to(self.stored["labels"].device)
        return tuple(t.index_select(0, slots) for t in self.stored.values())

    def sample_distinct(self, total: int) -> tuple[Tensor, ...]:
        """As `sample`, but without replacement, and `total` over all processes: each gets its part of one draw.

        Fewer where fewer are held.
        """
        drawn = torch.randperm(len(self), generator=self.generator)[:total]
        if (world := _world_size()) > 1:
            drawn = drawn[torch.distributed.get_rank() :: world]
        slots = self._slots(drawn).to(self.stored["labels"].device)
        return tuple(t.index_select(0, slots) for t in self.stored.values())

    def _state(self) -> dict[str, Tensor]:
        return {"generator": self.generator.get_state(), **super()._state()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        super()._restore(state)
        self.generator.set_state(state["generator"].cpu())


class Reservoir(_Bounded):
    """A uniform sample of the stream (Vitter, "Random Sampling with a Reservoir", 1985, algorithm R).

    The i-th sample (from 1) is kept with probability min(1, size / i), in a random slot once all are taken; of one
    batch, later samples overwrite earlier ones.
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__(size, seed)
        self.seen = 0

    def __len__(self) -> int:
        return min(self.seen, self.size)

    def _place(self, labels: Tensor) -> dict[int, int]:
        first, last = self.seen, self.seen + len(labels)
        self.seen = last
        if last <= self.size:
            return {first + position: position for position in range(len(labels))}
        draws = _draw_below(torch.arange(first + 1, last + 1), self.generator)
        for position in range(self.size - first):  # the batch that fills the memory
            draws[position] = first + position
        return {slot: position for position, slot in enumerate(draws) if slot < self.size}

    def _state(self) -> dict[str, Tensor]:
        return {"seen": torch.tensor(self.seen), **super()._state()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        super()._restore(state)
        self.seen = int(state["seen"])


class ClassBalanced(_Bounded):
    """Equal room for each class seen: a reservoir of size // classes per class.

    A new class shrinks the room of all others, each to a random part of what it holds, which keeps it a uniform
    sample of its class. Chrysakis and Moens, "Online Continual Learning from Imbalanced Data", ICML 2020, have the
    same aim with uneven quotas. Labels are read on the host once a batch.
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__(size, seed)
        self.seen: dict[int, int] = {}  # class → samples seen, in the order met: the k-th has slots k·quota …

    @property
    def quota(self) -> int:
        """Samples kept of each class."""
        return self.size // max(1, len(self.seen))

    def __len__(self) -> int:
        return sum(min(n, self.quota) for n in self.seen.values())

    def _place(self, labels: Tensor) -> dict[int, int]:
        classes = labels.tolist()
        if new := [c for c in dict.fromkeys(classes) if c not in self.seen]:
            self._make_room(new)
        counts = []
        for c in classes:
            self.seen[c] += 1
            counts.append(self.seen[c])
        draws = _draw_below(torch.tensor(counts, dtype=torch.int64), self.generator)
        start = {c: k * self.quota for k, c in enumerate(self.seen)}
        slots = {}
        for position, (c, count, draw) in enumerate(zip(classes, counts, draws, strict=True)):
            within = count - 1 if count <= self.quota else draw
            if within < self.quota:
                slots[start[c] + within] = position
        return slots

    def _make_room(self, new: list[int]) -> None:
        """Move the classes held to smaller blocks, so that `new` ones find theirs."""
        old, held = self.quota, [min(n, self.quota) for n in self.seen.values()]
        self.seen.update(dict.fromkeys(new, 0))
        if self.quota == 0:
            raise ValueError(f"a memory of {self.size} has no room for {len(self.seen)} classes")
        to, source = [], []
        for k, n in enumerate(held):
            kept = torch.arange(n) if n <= self.quota else torch.randperm(n, generator=self.generator)[: self.quota]
            source.append(k * old + kept)
            to.append(k * self.quota + torch.arange(len(kept)))
        if to:
            rows, targets = torch.cat(source), torch.cat(to)
            for t in self.stored.values():
                t[targets.to(t.device)] = t[rows.to(t.device)]

    def _slots(self, drawn: Tensor) -> Tensor:
        held = torch.tensor([min(n, self.quota) for n in self.seen.values()])
        ends = held.cumsum(0)
        block = torch.searchsorted(ends, drawn, right=True)
        return block * self.quota + drawn - (ends - held)[block]

    def _state(self) -> dict[str, Tensor]:
        seen = torch.tensor(list(self.seen.items()), dtype=torch.int64).reshape(-1, 2)
        return {"seen": seen, **super()._state()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        super()._restore(state)
        self.seen = dict(state["seen"].tolist())


def _draw_below(bounds: Tensor, generator: torch.Generator) -> list[int]:
    """For each bound b (B,) an integer uniform on 0 … b − 1."""
    return (torch.rand(len(bounds), dtype=torch.float64, generator=generator) * bounds).long().tolist()


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def _gather(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The batches of all processes, one after the other; their lengths may differ."""
    world, labels = _world_size(), batch["labels"]
    counts = [labels.new_zeros(1, dtype=torch.int64) for _ in range(world)]
    torch.distributed.all_gather(counts, labels.new_tensor([len(labels)], dtype=torch.int64))
    lengths = torch.cat(counts).tolist()
    whole = {}
    for name, rows in batch.items():
        padded = rows.new_zeros((max(lengths), *rows.shape[1:]))
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in range(world)]
        torch.distributed.all_gather(parts, padded)
        whole[name] = torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)])
    return whole
