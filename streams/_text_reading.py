"""Where the tasks of a benchmark of text are read from, and by which names."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from clplat.data.unlearning_sets import TOFU, find_sets
from clplat.errors import MissingError, UserError
from clplat.streams import _text_tasks
from clplat.streams._text_tasks import OLORA, ORDERS, Task


@dataclass(frozen=True)
class Source:
    """A benchmark and where it is, by options of `Text`, which explains them.

    Args:
        root: folder of data sets, or None.
    """

    benchmark: str
    order: int
    path: str | None
    instructions: str | None
    choices: int
    root: Path | None

    def read(
        self, names: Sequence[str], absent: str, said: tuple[bool, bool, bool], notes: list[str]
    ) -> list[Task]:  # fmt: skip
        """The tasks with these full names, in order; `notes` takes a line for each that is left out.

        Args:
            said: around a text: whether a cue for its answer, a preamble, and a chat.
        """
        found: list[Task] = []
        missing: list[str] = []
        for name in names:
            try:
                found.append(self._task(name, *said))
            except MissingError as error:
                missing += error.faults
        if missing and (absent == "error" or not found):
            raise MissingError(*missing)
        notes += [f"{fault.partition(' is missing')[0]} is missing and left out" for fault in missing]
        return found

    def learned(self, names: Sequence[str] | None, general: Sequence[str]) -> list[str]:
        """Full names of the tasks of a stream: `names`, or what the benchmark has but those of `general`."""
        if names is not None:
            return self.full(names)
        if self.benchmark == "olora":
            return list(ORDERS[self.order])
        if self.benchmark == "tofu":
            return ["retain90", "forget10"]
        known = list(_text_tasks.TRACE) if self.benchmark == "trace" else self.known
        return [name for name in known if name not in general]

    def full(self, names: Sequence[str], key: str = "tasks") -> list[str]:
        """The known tasks called `names`, or for each the only one that starts with it and an underscore.

        Raises:
            UserError: there is none, or one stands there twice.
        """
        found = []
        for name in names:
            fits = [k for k in self.known if k == name or k.startswith(f"{name}_")]
            if len(fits) != 1:
                raise UserError(f"stream.{key}: {name!r} is unknown (valid: {', '.join(self.known)})")
            found += fits
        if twice := [name for name in dict.fromkeys(found) if found.count(name) > 1]:
            raise UserError(f"stream.{key}: {twice[0]} stands there twice (valid: each task once)")
        return found

    @cached_property
    def known(self) -> list[str]:
        """All tasks of the benchmark."""
        place = self._place
        if self.benchmark == "olora":
            found = list(OLORA)
        elif self.benchmark == "superni":
            found = _text_tasks.superni_names(place)
        elif self.benchmark == "trace":
            found = [*_text_tasks.TRACE, *_text_tasks.BESIDE_TRACE]
        elif self.benchmark == "tofu":
            found = list(TOFU)
        else:
            found = [place.name.partition(".")[0]] if place.is_file() else sorted(p.name for p in place.glob("*/"))
        if not found:
            raise MissingError(f"stream.path: {place} holds no task: put folders with train.jsonl and test.jsonl there")
        return found

    def _task(self, name: str, cue: bool, preamble: bool, chat: bool) -> Task:
        place = self._place
        if self.benchmark == "olora":
            return _text_tasks.olora_task(place, name, self._lines, cue, preamble)
        if self.benchmark == "superni":
            return _text_tasks.superni_task(place, name, self.choices, cue)
        if self.benchmark == "tofu":
            return _text_tasks.tofu_task(place, name, chat)
        if place.is_file():
            return _text_tasks.file_task(place, self.choices, "rouge_l")
        metrics = _text_tasks.TRACE | _text_tasks.BESIDE_TRACE if self.benchmark == "trace" else {}
        metric = metrics.get(name, "rouge_l")
        return _text_tasks.folder_task(place / name, name, self.choices, _text_tasks.plain_row, metric)

    @cached_property
    def _lines(self) -> dict[str, str]:
        file = None if self.instructions is None else find(self.instructions, self.root, "instructions")
        return _text_tasks.instruction_lines(file)

    @cached_property
    def _place(self) -> Path:
        """The folder of the benchmark, or its file."""
        benchmark, path, root = self.benchmark, self.path, self.root
        if benchmark == "tofu":
            return find_sets("tofu", path, root)
        if benchmark in ("olora", "superni"):
            if path is not None:
                raise UserError(
                    f"stream.path: {path!r} has no meaning here (valid: null; used with trace, jsonl, tofu)"
                )
            if root is None:
                raise MissingError(
                    f"data_root: not set, and so there is no {benchmark}_text: give --data_root DIR, or set "
                    f"CLPLAT_DATA, to the folder that holds {benchmark}_text"
                )
            return root
        if path is None:
            raise UserError(
                f"stream.path: null (valid for {benchmark}: its folder{', or a file' * (benchmark == 'jsonl')})"
            )
        return find(path, root)


def find(path: str, root: Path | None, option: str = "path") -> Path:
    """A path as given, or in the data root.

    Raises:
        MissingError: in neither place.
    """
    for place in (Path(path).expanduser(), *([root / path] if root is not None else [])):
        if place.exists():
            return place
    raise MissingError(f"stream.{option}: {path} is missing: put it there, or into the data root")
