"""Unlearning: any stream with requests to forget put into it, from a seed or from a list.

Protocol: all of the stream is learned in order, and distinct parts of it are erased at random places after their own
learning, as in Liu, Liu, Stone, "Continual Learning and Private Unlearning", CoLLAs 2022, arXiv:2203.12817.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from clplat.config import discovery
from clplat.data.datasets import find_root
from clplat.data.worlds import generator
from clplat.erasure.ledger import same_source
from clplat.erasure.requests import History
from clplat.errors import ClplatError, MissingError, UserError
from clplat.preprocessing import Preprocessing
from clplat.stream import Data, Experience, Kind, Stream

Users = dict[int, tuple[Data, Tensor]]
_DRAWN = {"unit": "class", "count": 1, "size": 1, "positions": "random"}  # options of drawn requests


@dataclasses.dataclass
class _Event:
    """What comes after an experience of the base stream."""

    after: int
    ids: tuple[str, ...]
    teach: bool = False
    key: str = "stream.count"


class Unlearning(Stream):
    """Any stream, with requests to forget classes, samples, experiences or users, and with further learning.

    Requests are drawn: `count` of them, each of `size` units, all distinct. Or they are listed in `requests`: an entry
    is an id, a list of ids, or a mapping `{erase: ids, after: experience}`; without `after` it comes at the end. Ids
    are `class:7`, `sample:1234` (a row of the training tensors), `experience:split_0` and `user:5`. An entry
    `{learn: ids, after: experience}` teaches erased data again.

    Args:
        seed: of the requests and of the base; null takes the run's seed.
        data_root: of the base, and where a relative `user_assignment` is looked for; null is $CLPLAT_DATA.
        base: name of the stream that is learned, or path.py:Class; from Python also a stream or a class of streams.
        base_options: its options.
        requests: listed; null draws them.
        unit: what drawn requests name.
        count: drawn requests, ≥ 1.
        size: units in each, ≥ 1.
        positions: of drawn requests: random, somewhere after what they name has been learned, or all at the end.
        one_shot: make one request, after the last, of all of them.
        order_seed: shuffle the order of the requests, which must all come at one place; null keeps it.
        users: where they are drawn: users that share out the samples of each learn experience, ≥ 1; the k-th user of
            the i-th experience is user:(i · users + k).
        user_assignment: user of each row of the training tensors, -1 for none: an .npy file, or a list; null draws.

    Raises:
        UserError: an option out of range; a request that can't be met where it stands, as the ledger says.
        MissingError: as the base does; no such file of users.
    """

    kinds: ClassVar[frozenset[Kind]] = frozenset({Kind.LEARN, Kind.FORGET})
    paper: ClassVar[str] = "arXiv:2203.12817"

    def __init__(
        self,
        *,
        seed: int | None = None,
        data_root: str | None = None,
        base: Any = "digits",
        base_options: dict[str, Any] | None = None,
        requests: list[Any] | None = None,
        unit: Literal["class", "sample", "experience", "user"] = "class",
        count: int = 1,
        size: int = 1,
        positions: Literal["random", "end"] = "random",
        one_shot: bool = False,
        order_seed: int | None = None,
        users: int = 10,
        user_assignment: str | list[int] | None = None,
    ) -> None:
        drawn: dict[str, Any] = {"unit": unit, "count": count, "size": size, "positions": positions}
        faults = [f"stream.{k}: {v} is out of range (valid: ≥ 1)"
                  for k, v in {"count": count, "size": size, "users": users}.items() if v < 1]  # fmt: skip
        if order_seed is not None and order_seed < 0:
            faults.append(f"stream.order_seed: {order_seed} is out of range (valid: ≥ 0, or null)")
        if requests is not None:
            faults += [f"stream.{k}: {v!r} has no meaning with listed requests (valid: {_DRAWN[k]!r})"
                       for k, v in drawn.items() if v != _DRAWN[k]]  # fmt: skip
        if faults:
            raise UserError(*faults)
        seed = 0 if seed is None else seed
        self.base = _base(base, base_options, seed, data_root)
        learned = [e for e in self.base if e.kind is Kind.LEARN]
        self.users = people = _users(learned, users, seed, _assignment(user_assignment, data_root))
        events = _draw(self.base, people, seed, **drawn) if requests is None else _listed(self.base, requests)
        if order_seed is not None:
            _shuffle(events, order_seed)
        if one_shot:
            events = _as_one(events)
        super().__init__(
            _insert(self.base, events, people),
            num_classes=self.base.num_classes,
            input_shape=self.base.input_shape,
            task_known=self.base.task_known,
            class_names=self.base.class_names,
            augment=self.base.augment,
        )
        self.answers, self.notes, self.origin = self.base.answers, self.base.notes, self.base.origin
        self.normalize, self.normalize_asked = self.base.normalize, self.base.normalize_asked
        self.general, self.base.general = self.base.general, {}
        self.base.experiences = ()  # they are ours now: only what the base does to a batch is still asked of it

    def prepare(self, inputs: Tensor, training: bool) -> Tensor:
        return self.base.prepare(inputs, training)

    def preprocessing(self) -> Preprocessing:
        return dataclasses.replace(super().preprocessing(), refused=self.base.preprocessing().refused)

    def leave_normalization(self) -> None:
        self.base.leave_normalization()
        super().leave_normalization()

    def arrange(self, data: Data, order: Tensor, batch_size: int) -> Tensor:
        return self.base.arrange(data, order, batch_size)

    def score(self, predictions: Tensor, labels: Tensor) -> Tensor:
        return self.base.score(predictions, labels)

    def weights(self, labels: Tensor) -> Tensor:
        return self.base.weights(labels)

    def pooled(self, mean: float) -> float:
        return self.base.pooled(mean)

    def to(self, device: torch.device) -> Stream:
        self.base.to(device)
        return super().to(device)


def _base(base: Any, options: dict[str, Any] | None, seed: int, data_root: str | None) -> Stream:
    """The stream to put requests into; what it finds wrong is said of `base_options`."""
    if isinstance(base, Stream):
        stream = base
        if options:
            raise UserError("stream.base_options: has no meaning with a finished stream (valid: null)")
    elif isinstance(base, str) or (isinstance(base, type) and issubclass(base, Stream)):
        given = {"seed": seed, **(options or {})}
        try:
            make: Any = discovery.load("streams", base) if isinstance(base, str) else base
            stream = make(data_root=data_root, **given)
        except ClplatError as error:
            raise type(error)(*(_of_base(f) for f in error.faults)) from error
    else:
        raise UserError(f"stream.base: {base!r} is no name of a stream")
    if any(e.kind is Kind.FORGET for e in stream):
        raise UserError("stream.base: holds requests to forget already (valid: a stream without)")
    if all(e.kind is not Kind.LEARN for e in stream):
        raise UserError("stream.base: teaches nothing that could be erased (valid: a stream with learn experiences)")
    if stream.perplexity:
        raise UserError("stream.base: is scored by perplexity, which no metric of erasure takes (valid: another)")
    return stream


def _of_base(fault: str) -> str:
    key, colon, rest = fault.partition(":")
    if key == "stream":
        return f"stream.base{colon}{rest}"
    return f"stream.base_options.{key.removeprefix('stream.')}{colon}{rest}" if key.startswith("stream.") else fault


# --- users ------------------------------------------------------------------------------------------------------------


def _assignment(given: str | list[int] | None, data_root: str | None) -> Tensor | None:
    """User of each row (N,) int64, or None."""
    if given is None:
        return None
    if isinstance(given, list):
        return torch.tensor(given, dtype=torch.int64)
    file, root = Path(given).expanduser(), find_root(data_root)
    file = root / file if root is not None and not file.is_file() else file
    try:
        array = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise MissingError(f"stream.user_assignment: {file} is missing: put it there, or name another path") from None
    except (OSError, ValueError) as error:
        raise MissingError(f"stream.user_assignment: {file} can't be read ({error})") from error
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise UserError(f"stream.user_assignment: {file} holds {array.dtype} {array.shape} (valid: integers, (N,))")
    return torch.from_numpy(array.astype(np.int64))


def _users(learned: list[Experience], count: int, seed: int, assignment: Tensor | None) -> Users:
    """Data set and rows (m,), sorted, of each user."""
    if assignment is not None:
        data = learned[0].train
        assert data is not None
        if any(e.train is None or not same_source(e.train, data) for e in learned):
            raise UserError("stream.user_assignment: needs a base of one data set in one guise (valid here: null)")
        if len(assignment) != len(data.inputs):
            lengths = f"{len(assignment)} rows for {len(data.inputs)} training samples"
            raise UserError(f"stream.user_assignment: holds {lengths} (valid: one user a sample)")
        return {u: (data, (assignment == u).nonzero()[:, 0]) for u in assignment.unique().tolist() if u >= 0}
    found: Users = {}
    taken: list[tuple[Data, Tensor]] = []
    for i, e in enumerate(learned):
        assert e.train is not None
        rows = e.train.row_ids()
        for data, others in taken:  # a sample that is learned again belongs to who had it first
            rows = rows[~torch.isin(rows, others)] if same_source(data, e.train) else rows
        taken.append((e.train, rows))
        order = torch.from_numpy(generator(seed, "users", i).permutation(len(rows)))
        for k, part in enumerate(rows[order].tensor_split(count)):
            if len(part):
                found[i * count + k] = e.train, part.sort().values
    return found


# --- which requests, and where ----------------------------------------------------------------------------------------


def _draw(base: Stream, users: Users, seed: int, *, unit: str, count: int, size: int, positions: str) -> list[_Event]:
    """`count` requests of `size` distinct units each, in the order of their places."""
    last = _last_learned(base, users, unit)
    if count * size > len(last):
        what = f"{count} requests of {size} make {count * size} of {len(last)} of unit {unit}"
        raise UserError(f"stream.count: {what} (valid: at most {len(last)} in all)")
    rng, units = generator(seed, "requests"), np.array(list(last))
    chosen = rng.permutation(len(units))[: count * size].reshape(count, size)
    events = []
    for k, row in enumerate(chosen):
        ids = tuple(f"{unit}:{units[j]}" for j in row)
        earliest = max(last[units[j].item()] for j in row)
        place = len(base) - 1
        # Each request has a generator of its own, so that one more changes none of the others.
        drawn = int(generator(seed, "place", k).integers(earliest, len(base)))
        events.append(_Event(drawn if positions == "random" else place, ids))
    return sorted(events, key=lambda e: e.after)


def _last_learned(base: Stream, users: Users, unit: str) -> dict[Any, int]:
    """Each unit → the last experience that teaches any of it."""
    last: dict[Any, int] = {}
    for e in base:
        if e.kind is not Kind.LEARN or e.train is None:
            continue
        if unit == "class":
            last |= dict.fromkeys(e.classes, e.index)
        elif unit == "experience":
            last[e.name] = e.index
        elif unit == "sample":
            first = next(other.train for other in base if other.kind is Kind.LEARN)
            if first is None or not same_source(first, e.train):
                raise UserError("stream.unit: 'sample' needs a base of one data set in one guise (valid: experience)")
            last |= dict.fromkeys(e.train.row_ids().tolist(), e.index)
    if unit == "user":
        learns = [e for e in base if e.kind is Kind.LEARN and e.train is not None]
        for user, (data, rows) in users.items():
            holding = [e.index for e in learns if e.train is not None and same_source(e.train, data)
                       and torch.isin(rows, e.train.row_ids()).any()]  # fmt: skip
            if holding:
                last[user] = holding[-1]
    return last


def _listed(base: Stream, requests: list[Any]) -> list[_Event]:
    """The entries of `requests`, by place; those of one place in their order."""
    names, faults, events = [e.name for e in base], list[str](), list[_Event]()
    for i, entry in enumerate(requests):
        key = f"stream.requests[{i}]"
        try:
            events.append(_event(entry, names, key))
        except UserError as error:
            faults += error.faults
    if not requests:
        faults.append("stream.requests: is empty (valid: a list of ids, or null to draw them)")
    if faults:
        raise UserError(*faults)
    return sorted(events, key=lambda e: e.after)


def _event(entry: Any, names: list[str], key: str) -> _Event:
    fields = entry if isinstance(entry, dict) else {"erase": entry}
    what = [k for k in ("erase", "learn") if k in fields]
    if len(what) != 1 or set(fields) - {"erase", "learn", "after"}:
        raise UserError(f"{key}: {entry!r} is no request (valid: an id, a list of ids, {{erase: ids, after: name}})")
    ids = [fields[what[0]]] if isinstance(fields[what[0]], str) else fields[what[0]]
    if not isinstance(ids, list) or not all(isinstance(i, str) for i in ids):
        raise UserError(f"{key}: {ids!r} are no ids (valid: class:N, sample:ROW, experience:NAME, user:N)")
    after = fields.get("after", names[-1])
    if isinstance(after, int) and not isinstance(after, bool) and 0 <= after < len(names):
        after = names[after]
    if after not in names:
        near = discovery.did_you_mean(str(after), names) or f" (valid: {', '.join(names)})"
        raise UserError(f"{key}.after: {after!r} is no experience of the base{near}")
    return _Event(names.index(after), tuple(ids), what[0] == "learn", key)


def _shuffle(events: list[_Event], order_seed: int) -> None:
    """Put the requests into another order."""
    if len({e.after for e in events}) > 1 or any(e.teach for e in events):
        raise UserError(
            f"stream.order_seed: {order_seed} has no meaning where requests have places of their own "
            "(valid: null; used with positions end)"
        )
    events[:] = [events[i] for i in generator(order_seed, "order").permutation(len(events))]


def _as_one(events: list[_Event]) -> list[_Event]:
    """All requests as one."""
    if any(e.teach for e in events):
        raise UserError("stream.one_shot: has no meaning where data are learned again (valid: false)")
    ids = tuple(i for e in events for i in e.ids)
    return [_Event(max(e.after for e in events), ids, key=events[0].key.partition("[")[0])]


def _insert(base: Stream, events: list[_Event], users: Users) -> list[Experience]:
    """The base's experiences, and after each what has its place there."""
    history, faults, made = History(users, base.task_known), list[str](), {False: 0, True: 0}
    for e, follows in _places(base, events):
        history.add(dataclasses.replace(e, index=len(history.experiences)))
        for event in follows:
            name = f"{'relearn' if event.teach else 'forget'}-{made[event.teach]}"
            made[event.teach] += 1
            try:
                history.add((history.teach if event.teach else history.forget)(name, event.ids))
            except UserError as error:
                faults += [f"{event.key}: {fault}" for fault in error.faults]
    if faults:
        raise UserError(*faults)
    return history.experiences


def _places(base: Stream, events: list[_Event]) -> Iterator[tuple[Experience, list[_Event]]]:
    for e in base:
        yield e, [event for event in events if event.after == e.index]
