"""The ledger of a run: what was learned, what was erased on request and when, and which requests can't be met.

A request names ids of one kind: `class:7`, `sample:1234` (a row of the data set's tensors), `experience:split_0` (by
name) or `user:5`. It is refused, and nothing is changed, where it names nothing, an id twice, an id that is unknown,
or something that was never learned or is erased already. What a later experience teaches again is learned again.

`Membership` is the logic alone, over ids and, where data are at hand, over rows; `Ledger` follows a stream with it and
writes one event for each experience: plain values, kept in the run's record (so in every checkpoint) and written to
`ledger.json` in the run's folder when an experience begins and when it is done:

    {"index", "name", "kind", "request": [ids], "classes": [ids], "samples": n, "rows_sha256": hex or null,
     "started", "finished": ISO 8601 in UTC or null, "seconds": of training or null, "outcome": "under way" | "done" |
     "refused: <why>"}

Shapes: N samples of a data set, n of an experience.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

from clplat.errors import UserError
from clplat.stream import Data, Experience, Kind

FORMS = "class:N, sample:ROW, experience:NAME, user:N"
_ID = re.compile(r"(class|sample|user):(\d+)|(experience):(.+)")


def parse_id(text: str) -> tuple[str, str] | None:
    """("class", "7") of "class:7"; None where it has no such form."""
    found = _ID.fullmatch(text)
    return None if found is None else (found[1] or found[3], found[2] or found[4])


def same_source(one: Data, other: Data) -> bool:
    """Whether a row means the same sample in both: one tensor, seen through one world."""
    return one.inputs is other.inputs and one.world is other.world


@dataclass(eq=False)
class Source:
    """A data set in one guise, and which of its rows have been learned, and are not erased: (N,) bool each."""

    data: Data
    learned: Tensor
    active: Tensor


@dataclass
class Membership:
    """Which experiences, classes and samples are learned and not erased.

    Args:
        everything: whatever was not erased counts as learned: for a model that comes trained to a stream without
            learn experiences.
    """

    everything: bool = False
    classes: dict[int, bool] = field(default_factory=dict)  # class → learned and not erased
    experiences: dict[str, tuple[tuple[int, ...], Data | None]] = field(default_factory=dict)
    sources: list[Source] = field(default_factory=list)
    erased_by: dict[str, str] = field(default_factory=dict)  # id → request that erased it last

    @classmethod
    def of(cls, events: Iterable[Mapping[str, Any]]) -> Membership:
        """What the events of a ledger leave, known by ids only: rows are not kept in a ledger."""
        done = [e for e in events if e["outcome"] == "done"]
        found = cls(everything=all(e["kind"] != Kind.LEARN for e in done))
        for e in done:
            if e["kind"] == Kind.LEARN:
                found.learn(e["name"], e["classes"])
            elif e["kind"] == Kind.FORGET:
                found.erase(e["name"], e["request"], e["classes"])
        return found

    def take(self, experience: Experience) -> None:
        """Take in an experience that is done."""
        if experience.kind is Kind.LEARN:
            self.learn(experience.name, experience.classes, experience.train)
        elif experience.kind is Kind.FORGET:
            self.erase(experience.name, experience.request, experience.classes, experience.train)

    def learn(self, name: str, classes: Sequence[int], data: Data | None = None) -> None:
        """What an experience taught; what was erased before is active again."""
        self.experiences[name] = (tuple(classes), data)
        self.classes |= dict.fromkeys(classes, True)
        self.erased_by.pop(f"experience:{name}", None)
        for c in classes:
            self.erased_by.pop(f"class:{c}", None)
        if data is not None:
            source, rows = self.source(data), data.row_ids().cpu()
            source.learned[rows] = source.active[rows] = True

    def erase(self, name: str, request: Sequence[str], classes: Sequence[int], data: Data | None = None) -> None:
        """What a request took away: its rows, and every row of `classes`, which it erases as a whole."""
        self.erased_by |= dict.fromkeys(request, name)
        self.classes |= dict.fromkeys(classes, False)
        if data is not None:
            self.source(data).active[data.row_ids().cpu()] = False
        if classes:
            for source in self.sources:
                if source.data.labels is not None:
                    source.active &= ~torch.isin(source.data.labels.cpu(), torch.tensor(list(classes)))

    def source(self, data: Data) -> Source:
        """What is known of the data set that `data` are a part of; new ones are taken up."""
        for source in self.sources:
            if same_source(source.data, data):
                return source
        known = torch.full((len(data.inputs),), self.everything)
        self.sources.append(Source(data, known, known.clone()))
        return self.sources[-1]

    def known(self, data: Data) -> bool:
        """Whether anything of this data set has been learned."""
        return self.everything or any(same_source(s.data, data) for s in self.sources)

    def active_rows(self, data: Data) -> Tensor:
        """Rows (m,) of `data` that are learned and not erased."""
        rows = data.row_ids().cpu()
        return rows[self.source(data).active[rows]] if self.known(data) else rows[:0]

    # --- faults -------------------------------------------------------------------------------------------------------

    def faults(
        self, name: str, request: Sequence[str], classes: Sequence[int] = (), data: Data | None = None
    ) -> list[str]:
        """Why a request can't be met, one line each; empty where it can. Changes nothing.

        Args:
            name: of the request, for the messages.
            request: its ids.
            classes: those it erases as a whole.
            data: the samples to erase; None checks ids alone.
        """
        if not request:
            return [f"{name}: names nothing to erase (valid: {FORMS})"]
        found = [f"{name}: names {i} {n} times" for i, n in Counter(request).items() if n > 1]
        kinds = {None if (parsed := parse_id(i)) is None else parsed[0] for i in request}
        if None in kinds:
            return found + [f"{name}: '{i}' is no id (valid: {FORMS})" for i in request if parse_id(i) is None]
        if len(kinds) > 1:
            return [*found, f"{name}: names ids of several kinds ({', '.join(sorted(map(str, kinds)))}): ask for one"]
        found += [f"{name}: {fault}" for i in request if (fault := self._id_fault(i)) is not None]
        if not found and data is not None:
            found += [f"{name}: {fault}" for fault in self._data_faults(request, kinds.pop(), classes, data)]
        return found

    def _id_fault(self, text: str) -> str | None:
        """What is wrong with one id, as far as ids alone tell."""
        kind, value = parse_id(text) or ("", "")
        if kind == "class" and not self.classes.get(int(value), self.everything):
            return self._erased(text) if int(value) in self.classes else f"{text} {_never('class', self.classes)}"
        if kind == "experience" and not self.everything:
            if value not in self.experiences:
                return f"{text} {_never('experience', self.experiences)}"
            classes, data = self.experiences[value]
            if data is None and (text in self.erased_by or (classes and not any(self.classes[c] for c in classes))):
                return self._erased(text)
            if data is not None and not len(self.active_rows(data)):
                return self._erased(text)
        return None

    def _erased(self, text: str) -> str:
        by = self.erased_by.get(text)
        return f"{text} is erased already" + (f" (by {by})" if by else "")

    def _data_faults(self, request: Sequence[str], kind: str | None, classes: Sequence[int], data: Data) -> list[str]:
        """What is wrong with the samples of a request whose ids are right."""
        rows = data.row_ids().cpu()
        if not len(rows):
            return [f"{_few(request)}: has no samples to erase"]
        numbers = sorted(int(i.partition(":")[2]) for i in request) if kind in ("class", "sample") else []
        if kind == "class" and sorted(classes) != numbers:
            return [f"its classes {sorted(classes)} are not those it names ({_few(request)})"]
        if (
            kind == "class"
            and data.labels is not None
            and (other := sorted(set(data.targets().tolist()) - set(numbers)))
        ):
            return [f"its data hold classes {other}, which it does not name"]
        if kind == "sample" and sorted(rows.tolist()) != numbers:
            return ["its data are not the samples that it names"]
        if not self.known(data):  # a class may be given by samples of a data set of its own
            return [] if kind == "class" else [f"{_few(request)}: its samples were never learned"]
        source = self.source(data)
        what = (lambda n, r: f"sample:{r}") if kind == "sample" else (lambda n, r: f"{_few(request)}: sample {r}")
        never, again = rows[~source.learned[rows]].tolist(), rows[source.learned[rows] & ~source.active[rows]].tolist()
        found = [f"{what(len(never), never[0])} was never learned{_more(never)}"] if never else []
        return found + ([f"{what(len(again), again[0])} is erased already{_more(again)}"] if again else [])


def _never(kind: str, known: Iterable[Any]) -> str:
    names = ", ".join(f"{kind}:{k}" for k in known)
    return f"was never learned before it (learned: {names or 'nothing'})"


def _few(ids: Sequence[str]) -> str:
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


def _more(rows: list[int]) -> str:
    return f" (nor {len(rows) - 1} more of its samples)" if len(rows) > 1 else ""


class Ledger:
    """Follows a stream, refuses requests that can't be met, and writes down what is done.

    What is learned and erased at a place of the stream follows from the stream, so that a resumed run needs no more
    than its place; only the events are state.

    Args:
        stream: whose experiences are taken in order.
    """

    def __init__(self, stream: Sequence[Experience]) -> None:
        self.stream, self.position = stream, 0
        self.members = Membership(everything=all(e.kind is not Kind.LEARN for e in stream))

    def faults(self, index: int) -> list[str]:
        """Why the request at `index` can't be met once all before it is done; empty for other kinds."""
        while self.position < index:
            self.members.take(self.stream[self.position])
            self.position += 1
        e = self.stream[index]
        return self.members.faults(e.name, e.request, e.classes, e.train) if e.kind is Kind.FORGET else []

    def open(self, index: int, events: list[dict[str, Any]], write: Callable[[list[dict[str, Any]]], None]) -> None:
        """Enter an experience that begins.

        Raises:
            UserError: a request that can't be met; it is written as refused, and `events` are as they were.
        """
        e = self.stream[index]
        event: dict[str, Any] = {"index": index, "name": e.name, "kind": str(e.kind), "request": list(e.request)}
        event |= {"classes": list(e.classes), "samples": 0 if e.train is None else len(e.train)}
        event |= {"rows_sha256": None if e.train is None else rows_sha256(e.train), "started": _now()}
        event |= {"finished": None, "seconds": None, "outcome": "under way"}
        if faults := self.faults(index):
            write([*events, event | {"finished": event["started"], "outcome": "refused: " + "; ".join(faults)}])
            raise UserError(*(f"stream: experience {index}: {fault}" for fault in faults))
        events.append(event)
        write(events)

    @staticmethod
    def close(events: list[dict[str, Any]], seconds: float, write: Callable[[list[dict[str, Any]]], None]) -> None:
        """Note that the experience entered last is done, after `seconds` of training in the run so far."""
        before = sum(e["seconds"] for e in events[:-1])
        events[-1] |= {"finished": _now(), "seconds": seconds - before, "outcome": "done"}
        write(events)


def stream_faults(stream: Sequence[Experience]) -> list[str]:
    """Every request of a stream that can't be met where it stands, one line each."""
    ledger, found = Ledger(stream), list[str]()
    for index in range(len(stream)):
        found += [f"stream: experience {index}: {fault}" for fault in ledger.faults(index)]
    return found


def rows_sha256(data: Data) -> str:
    """SHA-256 of the rows of `data`, sorted, as little-endian 64-bit integers."""
    return hashlib.sha256(data.row_ids().cpu().sort().values.numpy().astype("<i8").tobytes()).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
