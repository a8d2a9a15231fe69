"""Memories of past samples: a uniform reservoir, class-balanced ones, and everything seen.

A memory keeps inputs as the stream stores them (`strategy.raw`: before normalisation and augmentation), so that a
replayed sample is prepared, and augmented, anew. Its state is in `state_dict()`: what it holds, its counters and the
state of its own random generator; it takes its size from the state on loading, so that a resumed run goes on bit for
bit. It is held outside PyTorch's buffers, which DDP by default sends to all processes in every forward pass.

Under DDP every process passes its part of the global batch to `add`, in order of rank; all processes then hold the
same samples and the same generator, and `sample(n)` gives each of them its own n of one draw of n · world_size. So
P processes with batches of B equal one process with batches of P · B. With one process nothing is communicated.

A sample is offered once: in the passes over an experience's data after the first, the loop closes the memories
(`Bounded.open`), and `add` changes nothing.

Its inputs may be in a file of the run's folder (`loop.memory_on_disk`, see `clplat.components.filed`); the draws and
what is drawn are the same.

What a request erases must leave a memory too: `erase` removes it for good, slots included. Samples are told apart by
their rows in the data set, kept beside them as `rows` (`fill` does it, or `add(..., rows=strategy.rows)`).

Shapes: B samples of a batch, M replayed, S slots, n samples drawn.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn

from clplat.components.filed import Filed
from clplat.components.stored import CHUNK, Stored, class_ids
from clplat.errors import UserError
from clplat.strategy import require
from clplat.stream import Data


class Archive(Stored):
    """Everything that was put in it, without bound. For upper bounds (`joint`, `cumulative`), which break the rules of
    continual learning on purpose."""

    def extend(self, inputs: Tensor, labels: Tensor, **extras: Tensor) -> None:
        """Append inputs (n, ...), labels (n,) and, always under the same names, extras (n, ...).

        Every process passes the same rows.
        """
        for name, rows in {"inputs": inputs, "labels": labels, **extras}.items():
            self.stored[name] = torch.cat([self.stored[name], rows]) if name in self.stored else rows.clone()

    def fill(self, data: Data) -> None:
        """Append all samples of `data` with their rows."""
        inputs, labels = data.all()
        assert labels is not None
        self.extend(inputs, labels, rows=data.row_ids())

    def _keep(self, kept: Tensor) -> None:
        self.stored = {name: t[kept] for name, t in self.stored.items()}

    def __len__(self) -> int:
        return len(self.stored["labels"]) if self.stored else 0


class Bounded(Stored):
    """At most `size` samples; a subclass decides who goes where.

    Args:
        size: samples kept in all, ≥ 1.
        seed: of its own generator; None takes torch's seed. Must be the same on all processes.
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__()
        require("memory", size, size >= 1, "≥ 1")
        self.size = size
        self.open = True  # whether `add` takes what it is given; the loop's to set
        self.generator = torch.Generator().manual_seed(torch.initial_seed() if seed is None else seed)

    def _place(self, labels: Tensor) -> dict[int, int]:
        """Slot → position in the batch, of those that are kept. Counts the batch as seen."""
        raise NotImplementedError

    def fill(self, data: Data) -> None:
        """Offer all samples of `data`, once each, with their rows. Every process passes the same data."""
        rows, world = data.row_ids(), _world_size()
        rank = torch.distributed.get_rank() if world > 1 else 0
        parts = [c.tensor_split(world)[rank] for c in torch.arange(len(data), device=rows.device).split(CHUNK)]
        coming = data.ahead(parts)
        for positions in parts:
            inputs, labels = coming.batch(positions)
            assert labels is not None
            self.add(inputs, labels, rows=rows[positions])

    def _move(self, source: Tensor, to: Tensor) -> None:
        """Put the rows in slots `source` (n,) into slots `to` (n,), and zeros into all others."""
        for name, t in self.stored.items():
            if isinstance(t, Filed):
                t.move(source.cpu(), to.cpu())
                continue
            moved = torch.zeros_like(t)
            moved[to.to(t.device)] = t[source.to(t.device)]
            self.stored[name] = moved

    def add(self, inputs: Tensor, labels: Tensor, **extras: Tensor) -> None:
        """Offer a batch: inputs (B, ...), labels (B,) int64 and, always under the same names, extras (B, ...).

        Does nothing while the memory is closed, since these samples were offered in an earlier pass.
        Where the last dimension of an extra has grown (logits of a growing head), samples stored before hold NaN in
        the new columns.
        """
        if not self.open:
            return
        batch = {name: t.detach() for name, t in {"inputs": inputs, "labels": labels, **extras}.items()}
        if _world_size() > 1:
            batch = gathered(batch)
        if not self.stored:
            self.stored = {name: self._room(name, t) for name, t in batch.items()}
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

    def _room(self, name: str, like: Tensor) -> Any:
        """Zeros (size, ...), in a file where that is asked for; all but inputs are small."""
        if name == "inputs" and self.file is not None:
            return Filed(self.file, like, self.size)
        return like.new_zeros((self.size, *like.shape[1:]))

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


class Reservoir(Bounded):
    """A uniform sample of the stream (Vitter, "Random Sampling with a Reservoir", 1985, algorithm R).

    The i-th sample (from 1) is kept with probability min(1, size / i), in a random slot once all are taken; of one
    batch, later samples overwrite earlier ones.

    After an erasure new samples take the places of erased ones by random pairing (Gemulla, Lehner, Haas, "A Dip in the
    Reservoir", VLDB 2006): each stands for one erased sample of the stream, and is kept if that one was. How many of
    the stream's samples were erased is told from their share of the memory.
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__(size, seed)
        self.seen = 0  # samples offered and not erased
        self.held = 0
        self.pairs, self.vacant = 0, 0  # erased samples that no new one stands for yet, and those that were held

    def __len__(self) -> int:
        return self.held

    def _place(self, labels: Tensor) -> dict[int, int]:
        paired = min(self.pairs, len(labels))
        slots = self._pair(paired) if paired else {}
        first, last = self.seen, self.seen + len(labels) - paired
        if last == first:
            return slots
        self.seen, self.held = last, min(last, self.size)  # as many are held as if nothing had been erased
        if last <= self.size:
            return slots | {first + k: paired + k for k in range(last - first)}
        draws = _draw_below(torch.arange(first + 1, last + 1), self.generator)
        for k in range(self.size - first):  # the batch that fills the memory
            draws[k] = first + k
        return slots | {slot: paired + k for k, slot in enumerate(draws) if slot < self.size}

    def _pair(self, count: int) -> dict[int, int]:
        """Slots of those of the next `count` samples that stand for a held one."""
        slots = {}
        bounds = torch.arange(self.pairs, self.pairs - count, -1)
        for position, draw in enumerate(_draw_below(bounds, self.generator)):
            if draw < self.vacant:
                slots[self.held] = position
                self.held, self.vacant = self.held + 1, self.vacant - 1
        self.seen, self.pairs = self.seen + count, self.pairs - count
        return slots

    def _keep(self, kept: Tensor) -> None:
        places = kept.nonzero()[:, 0]
        self._move(places, torch.arange(len(places)))
        removed, before = self.held - len(places), self.held
        self.held = len(places)
        if self.held == 0 or (self.pairs == 0 and self.seen <= self.size):  # nothing is left, or all of it was held
            self.seen, self.pairs, self.vacant = self.held, 0, 0
            return
        erased = round(self.seen * removed / before)
        self.seen -= erased
        self.pairs, self.vacant = self.pairs + erased, self.vacant + removed

    def _state(self) -> dict[str, Tensor]:
        counts = torch.tensor([self.seen, self.held, self.pairs, self.vacant])
        return {"counts": counts, **super()._state()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        super()._restore(state)
        self.seen, self.held, self.pairs, self.vacant = state["counts"].tolist()


class ClassBalanced(Bounded):
    """Equal room for each class seen: a reservoir of size // classes per class.

    A new class shrinks the room of all others, each to a random part of what it holds, which keeps it a uniform
    sample of its class. Chrysakis and Moens, "Online Continual Learning from Imbalanced Data", ICML 2020, have the
    same aim with uneven quotas. Labels are read on the host once a batch. Free text is of one class.

    After an erasure the room is shared out anew among the classes left, and each takes new samples of its own until
    its room is full.
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__(size, seed)
        self.seen: dict[int, int] = {}  # class → samples seen, in the order met: the k-th has slots k·quota …
        self.held: dict[int, int] = {}  # class → samples held, in its first slots

    @property
    def quota(self) -> int:
        """Samples kept of each class."""
        return self.size // max(1, len(self.seen))

    def __len__(self) -> int:
        return sum(self.held.values())

    def _place(self, labels: Tensor) -> dict[int, int]:
        classes = class_ids(labels).tolist()
        if new := [c for c in dict.fromkeys(classes) if c not in self.seen]:
            self._make_room(new)
        counts = []
        for c in classes:
            self.seen[c] += 1
            counts.append(self.seen[c])
        draws = _draw_below(torch.tensor(counts, dtype=torch.int64), self.generator)
        start = {c: k * self.quota for k, c in enumerate(self.seen)}
        slots = {}
        for position, (c, draw) in enumerate(zip(classes, draws, strict=True)):
            within = draw
            if self.held[c] < self.quota:
                within, self.held[c] = self.held[c], self.held[c] + 1
            if within < self.quota:
                slots[start[c] + within] = position
        return slots

    def _make_room(self, new: list[int]) -> None:
        """Move the classes held to smaller blocks, so that `new` ones find theirs."""
        old, met = self.quota, list(self.seen)
        self.seen.update(dict.fromkeys(new, 0))
        if self.quota == 0:
            raise UserError(f"strategy.memory: {self.size} has no room for {len(self.seen)} classes (valid: more)")
        source = []
        for k, c in enumerate(met):
            n = self.held[c]
            kept = torch.arange(n) if n <= self.quota else torch.randperm(n, generator=self.generator)[: self.quota]
            source.append(k * old + kept)
        self._lay_out(dict(zip(met, source, strict=True)) | {c: torch.arange(0) for c in new})

    def _lay_out(self, source: dict[int, Tensor]) -> None:
        """Give each class, in order, its slots, and in the first of them what is in slots `source` (n,) of it now."""
        self.held = {c: len(rows) for c, rows in source.items()}
        if source and self.stored:
            to = [k * self.quota + torch.arange(n) for k, n in enumerate(self.held.values())]
            self._move(torch.cat(list(source.values())), torch.cat(to))

    def _keep(self, kept: Tensor) -> None:
        old, parts = self.quota, kept.cpu().split(list(self.held.values()))
        source = {c: k * old + part.nonzero()[:, 0] for k, (c, part) in enumerate(zip(self.held, parts, strict=True))}
        left = {c: rows for c, rows in source.items() if len(rows)}
        self.seen = {c: max(len(rows), round(self.seen[c] * len(rows) / self.held[c])) for c, rows in left.items()}
        if not left:
            self._move(torch.arange(0), torch.arange(0))
        self._lay_out(left)

    def _slots(self, drawn: Tensor) -> Tensor:
        held = torch.tensor(list(self.held.values()), dtype=torch.int64)
        ends = held.cumsum(0)
        block = torch.searchsorted(ends, drawn, right=True)
        return block * self.quota + drawn - (ends - held)[block]

    def _state(self) -> dict[str, Tensor]:
        rows = [[c, seen, self.held[c]] for c, seen in self.seen.items()]
        return {"seen": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3), **super()._state()}

    def _restore(self, state: dict[str, Tensor]) -> None:
        super()._restore(state)
        rows = state["seen"].tolist()
        self.seen, self.held = {c: seen for c, seen, _ in rows}, {c: held for c, _, held in rows}


class Greedy(Bounded):
    """The first samples of each class, with as many of each as there is room for, and no slot left empty.

    A sample is taken if its class is new or holds fewer than size / (classes met), and where all slots are taken in the
    place of a random sample of the class that holds most, of several the one met first. Labels are read on the host
    once a batch.

    Source: Prabhu, Torr, Dokania, "GDumb", ECCV 2020, algorithm 1.
    """

    def __init__(self, size: int, seed: int | None = None) -> None:
        super().__init__(size, seed)
        self.met: list[int] = []  # classes, in the order met
        self.places: list[int] = []  # the class of each slot that is taken

    def __len__(self) -> int:
        return len(self.places)

    def _place(self, labels: Tensor) -> dict[int, int]:
        slots, counts = {}, Counter(self.places)
        for position, c in enumerate(class_ids(labels).tolist()):
            if c in self.met and counts[c] >= self.size / len(self.met):
                continue
            if c not in self.met:
                self.met.append(c)
            slot = len(self.places)
            if slot < self.size:
                self.places.append(c)
            else:
                most = max(self.met, key=counts.__getitem__)
                theirs = [s for s, held in enumerate(self.places) if held == most]
                (draw,) = _draw_below(torch.tensor([len(theirs)]), self.generator)
                slot = theirs[draw]
                self.places[slot] = c
                counts[most] -= 1
            slots[slot], counts[c] = position, counts[c] + 1
        return slots

    def _keep(self, kept: Tensor) -> None:
        source = kept.cpu().nonzero()[:, 0]
        self.places = [self.places[s] for s in source.tolist()]
        self.met = [c for c in self.met if c in self.places]
        self._move(source, torch.arange(len(source)))

    def _state(self) -> dict[str, Tensor]:
        plain = {"met": self.met, "places": self.places}
        return {name: torch.tensor(v, dtype=torch.int64) for name, v in plain.items()} | super()._state()

    def _restore(self, state: dict[str, Tensor]) -> None:
        super()._restore(state)
        self.met, self.places = state["met"].tolist(), state["places"].tolist()


def _draw_below(bounds: Tensor, generator: torch.Generator) -> list[int]:
    """For each bound b (B,) an integer uniform on 0 … b − 1."""
    return (torch.rand(len(bounds), dtype=torch.float64, generator=generator) * bounds).long().tolist()


def _world_size() -> int:
    distributed = torch.distributed
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def gathered(batch: dict[str, Tensor]) -> dict[str, Tensor]:
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
