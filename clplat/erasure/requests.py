"""From the ids of a request to a forget experience: which rows to erase, what to score it on, which classes are gone.

    class:7           every row of the class that is learned and not erased
    sample:1234       one row
    experience:NAME   every row that the experience taught and that is not erased; classes that nothing else holds are
                      erased as a whole
    user:5            every row of the user that is learned and not erased

All rows of one request lie in one data set, seen in one guise (`Data.world`): an experience has one. Scored are, for
classes and experiences, the test samples that go with them; for samples and users (and where there are no such test
samples) the erased training samples.

Shapes: N samples of a data set, n of a request.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from clplat.erasure.ledger import FORMS, Membership, Source, parse_id, same_source
from clplat.errors import UserError
from clplat.stream import Data, Experience, Kind


@dataclass
class History:
    """What a stream holds up to a place in it.

    Args:
        users: data set and rows (m,) of each user.
        task_known: whether predictions are told the task, so that a request can be scored in one task only.
    """

    users: Mapping[int, tuple[Data, Tensor]] = field(default_factory=dict)
    task_known: bool = False
    experiences: list[Experience] = field(default_factory=list)
    members: Membership = field(default_factory=Membership)

    def add(self, experience: Experience) -> None:
        """Go on by one experience."""
        self.experiences.append(experience)
        self.members.take(experience)

    # --- what a request makes of the stream ---------------------------------------------------------------------------

    def forget(self, name: str, ids: Sequence[str]) -> Experience:
        """The experience that erases `ids` here.

        Raises:
            UserError: what the ledger refuses; an unknown user; ids of several data sets, guises or tasks.
        """
        if faults := self.members.faults(name, ids):
            raise UserError(*faults)
        source, rows = self._rows(name, ids, active=True)
        kind = (parse_id(ids[0]) or ("", ""))[0]
        classes = self._classes(kind, ids, source, rows)
        train = Data(source.data.inputs, source.data.labels, rows, source.data.world)
        test, valid = (self._held_out(part, kind, ids, classes) or train for part in ("test", "valid"))
        found = Experience(
            index=len(self.experiences),
            name=name,
            kind=Kind.FORGET,
            train=train,
            test=test,
            valid=valid if any(e.valid is not None for e in self.experiences) else None,
            classes=classes,
            task=self._task(name, train),
            request=tuple(ids),
        )
        if faults := self.members.faults(name, ids, classes, train):
            raise UserError(*faults)
        return found

    def teach(self, name: str, ids: Sequence[str]) -> Experience:
        """The experience that teaches erased `ids` again.

        Raises:
            UserError: an id that was never learned or is not erased.
        """
        unknown = [i for i in ids if parse_id(i) is None] or ([] if ids else ["nothing"])
        if unknown:
            raise UserError(f"{name}: '{unknown[0]}' can't be taught again (valid: {FORMS})")
        source, rows = self._rows(name, ids, active=False)
        train = Data(source.data.inputs, source.data.labels, rows, source.data.world)
        classes = tuple(sorted(set(train.targets().tolist())))
        kind = (parse_id(ids[0]) or ("", ""))[0]
        test, valid = (self._held_out(p, kind, ids, classes) if kind == "class" else None for p in ("test", "valid"))
        index, task = len(self.experiences), self._task(name, train)
        return Experience(index, name, Kind.LEARN, train, test, valid, classes=classes, task=task)

    def _rows(self, name: str, ids: Sequence[str], active: bool) -> tuple[Source, Tensor]:
        """The one data set that `ids` are in, and their rows (n,), sorted: those that are active, or those erased."""
        found: list[tuple[Source, Tensor]] = []
        if (parse_id(ids[0]) or ("", ""))[0] == "sample":
            return self._samples(name, ids, active)
        for text in ids:
            parts = [(s, r) for s, r in self._candidates(name, text, active) if len(r)]
            if not parts:
                raise UserError(f"{name}: {text} has no samples that are {'learned' if active else 'erased'}")
            found += parts
        if len({id(s) for s, _ in found}) > 1:
            learned = [(n, data) for n, (_, data) in self.members.experiences.items() if data is not None]
            where = ", ".join(n for n, data in learned if any(same_source(data, s.data) for s, _ in found))
            what = f"{', '.join(ids[:3])}: is in several data sets or guises ({where})"
            raise UserError(f"{name}: {what}: ask for an experience of these")
        return found[0][0], torch.cat([r for _, r in found]).unique()

    def _samples(self, name: str, ids: Sequence[str], active: bool) -> tuple[Source, Tensor]:
        """The data set that the rows `ids` are in, and the rows (n,), sorted."""
        rows = torch.tensor([int(i.partition(":")[2]) for i in ids])

        def where(marks: list[Tensor]) -> Tensor:  # (data sets, n) bool
            return torch.stack([(rows < len(m)) & m[rows.clamp(max=len(m) - 1)] for m in marks])

        sources = self.members.sources
        learned, wanted = where([s.learned for s in sources]), where([_wanted(s, active) for s in sources])
        for faulty, what in (
            (~learned.any(0), "was never learned before it (valid: rows of what was learned)"),
            (~wanted.any(0), "is erased already" if active else "is not erased"),
            (wanted.sum(0) > 1, "is a row of several data sets or guises: ask for an experience"),
        ):
            if faulty.any():
                raise UserError(f"{name}: {ids[int(faulty.int().argmax())]} {what}")
        found = wanted.int().argmax(0).unique().tolist()
        if len(found) > 1:
            raise UserError(f"{name}: its samples are in several data sets or guises: ask for those of one")
        return sources[found[0]], rows.unique()

    def _candidates(self, name: str, text: str, active: bool) -> list[tuple[Source, Tensor]]:
        """Rows of one id in each data set."""
        kind, value = parse_id(text) or ("", "")
        if kind == "user":
            if int(value) not in self.users:
                known = f"user:0 to user:{max(self.users)}" if self.users else "none: the stream has no users"
                raise UserError(f"{name}: {text} is unknown (valid: {known})")
            data, rows = self.users[int(value)]
            source = self.members.source(data)
            return [(source, rows[_wanted(source, active)[rows]])]
        if kind == "experience":
            _, part = self.members.experiences.get(value, ((), None))
            if part is None:
                return []
            source, rows = self.members.source(part), part.row_ids().cpu()
            return [(source, rows[_wanted(source, active)[rows]])]
        return [(s, _of_class(s, int(value), active)) for s in self.members.sources]

    def _classes(self, kind: str, ids: Sequence[str], source: Source, rows: Tensor) -> tuple[int, ...]:
        """Classes that the request erases as a whole."""
        if kind == "class":
            return tuple(sorted(int(i.partition(":")[2]) for i in ids))
        if kind != "experience" or source.data.labels is None:
            return ()
        named = torch.zeros_like(source.active)
        named[rows] = True
        left: set[int] = set()
        for s in self.members.sources:
            if s.data.labels is not None:
                left |= set(s.data.labels.cpu()[s.active & ~named if s is source else s.active].unique().tolist())
        here = set(source.data.labels.cpu()[rows].unique().tolist())
        return tuple(sorted(c for c in here - left if self.members.classes.get(c)))

    def _held_out(self, part: str, kind: str, ids: Sequence[str], classes: tuple[int, ...]) -> Data | None:
        """Held-out samples that go with erased classes or experiences; None where there are none."""
        learned = [(e.name, data) for e in self.experiences
                   if e.kind is Kind.LEARN and (data := getattr(e, part)) is not None]  # fmt: skip
        named = {i.partition(":")[2] for i in ids} if kind == "experience" else set()
        mine = [data for name, data in learned if name in named or (kind == "class" and _holds(data, classes))]
        if not mine or any(not same_source(d, mine[0]) for d in mine):
            return None
        rows, labels = torch.cat([d.row_ids().cpu() for d in mine]).unique(), mine[0].labels
        assert labels is not None
        if kind == "class":
            rows = rows[torch.isin(labels.cpu()[rows], torch.tensor(classes))]
        else:
            others = [d.row_ids().cpu() for name, d in learned
                      if name not in named and same_source(d, mine[0]) and self._active(name)]  # fmt: skip
            gone = torch.tensor([c for c, on in self.members.classes.items() if not on], dtype=torch.int64)
            rows = rows[~torch.isin(rows, torch.cat([torch.arange(0), *others]))]
            if len(gone):  # answers that are free text are of no class
                rows = rows[~torch.isin(labels.cpu()[rows], gone)]
        return Data(mine[0].inputs, mine[0].labels, rows, mine[0].world) if len(rows) else None

    def _active(self, name: str) -> bool:
        _, data = self.members.experiences[name]
        return data is None or len(self.members.active_rows(data)) > 0

    def _task(self, name: str, train: Data) -> int:
        """Task of the latest learn experience that holds a sample of the request."""
        rows, tasks = train.row_ids().cpu(), list[int]()
        for e in self.experiences:
            if e.kind is Kind.LEARN and e.train is not None and same_source(e.train, train):
                tasks += [e.task] if torch.isin(e.train.row_ids().cpu(), rows).any() else []
        if self.task_known and len(set(tasks)) > 1:
            raise UserError(f"{name}: its samples belong to tasks {sorted(set(tasks))}: ask for those of one task")
        return tasks[-1] if tasks else 0


def _wanted(source: Source, active: bool) -> Tensor:
    """Which rows (N,) bool are learned and not erased, or else erased."""
    return source.active if active else source.learned & ~source.active


def _holds(data: Data, classes: tuple[int, ...]) -> bool:
    return data.labels is not None and not set(classes).isdisjoint(data.targets().unique().tolist())


def _of_class(source: Source, label: int, active: bool) -> Tensor:
    labels = source.data.labels
    if labels is None:
        return torch.arange(0)
    return ((labels.cpu() == label) & _wanted(source, active)).nonzero()[:, 0]
