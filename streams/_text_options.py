"""Which options of a stream of text go together.

Each function raises UserError with a line for each fault.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from clplat.errors import UserError
from clplat.streams._text_pieces import Sharing
from clplat.streams._text_tasks import ORDERS, Task

# Of each option, whether a value holds, and what is valid.
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "answer": (lambda v: v in ("words", "class", None), "words, class, or null"),
    "order": (lambda v: v in ORDERS, "1 to 6"),
    "max_length": (lambda v: v >= 32, "≥ 32"),
    "max_answer": (lambda v: v >= 2, "≥ 2"),
    **dict.fromkeys(("buckets", "choices"), (lambda v: v >= 1, "≥ 1")),
    **dict.fromkeys(
        ("classes_per_task", "train_per_class", "test_per_class", "experiences"),
        (lambda v: v is None or v >= 1, "≥ 1, or null"),
    ),
    **dict.fromkeys(("blurry", "validation"), (lambda v: 0 <= v < 1, "in [0, 1)")),
    **dict.fromkeys(("adapt", "general"), (lambda v: v != [], "names of tasks, or null")),
    "general_texts": (lambda v: v != [], "text files or names of tasks, or null"),
    **dict.fromkeys(("disjoint", "repetition"), (lambda v: 0 <= v <= 1, "in [0, 1]")),
}


def check(benchmark: str, sharing: Sharing, **options: Any) -> None:
    """Refuse options out of range, then those that would not be read."""
    given = options | vars(sharing)
    faults = [
        f"stream.{key}: {given[key]!r} is out of range (valid: {valid})"
        for key, (holds, valid) in _RANGES.items()
        if not holds(given[key])
    ]
    if faults:
        raise UserError(*faults)
    _check_uses(benchmark, **options)
    _check_answer(**options)


def _check_uses(benchmark: str, **options: Any) -> None:
    """Refuse options that a benchmark would not read."""
    unused: dict[str, object] = {"instructions": None, "preamble": None, "order": 1}
    if benchmark == "olora":
        unused = {"choices": 20, **({} if options["tasks"] is None else {"order": 1})}
    elif benchmark == "tofu":
        unused["choices"] = 20
    faults = [
        f"stream.{key}: {options[key]!r} has no meaning here (valid: {plain!r}, its default)"
        for key, plain in unused.items()
        if options[key] != plain
    ]
    if options["tasks"] == []:
        faults.append("stream.tasks: [] names no task (valid: names, or null)")
    if faults:
        raise UserError(*faults)


def _check_answer(**options: Any) -> None:
    """Refuse options that a model with a head, or one that writes, would not read."""
    if options["answer"] != "class":
        if options["tell_task"] and options["evaluate"] == "generate":
            raise UserError("stream.tell_task: true, but what is written is not held to its classes (valid: false)")
        return
    unread = {"chat": False, "max_answer": 50, "evaluate": "score", "candidates": "all"}
    if faults := [
        f"stream.{key}: {options[key]!r} has no meaning with stream.answer class (valid: {plain!r}, its default)"
        for key, plain in unread.items()
        if options[key] != plain
    ]:
        raise UserError(*faults)


def check_shared(sharing: Sharing, found: Sequence[Task], **options: Any) -> None:
    """Refuse options of what is met where that the tasks, or the other options, leave without a meaning."""
    repeats, count, tasks = sharing.repetition > 0, sharing.experiences, len(found)
    unused = [
        ("adapt", None, not repeats and not sharing.blurry, "repetition 0 and blurry 0"),
        ("blurry", 0.0, not repeats and tasks > 1, "repetition 0 and at least two tasks"),
        ("disjoint", 0.0, sharing.blurry > 0, "blurry above 0"),
        ("experiences", None, repeats, "repetition above 0"),
    ]
    faults = [
        f"stream.{key}: {value!r} has no meaning here (valid: {'null' if plain is None else plain}; used with {where})"
        for key, plain, used, where in unused
        if not used and (value := getattr(sharing, key)) != plain
    ]
    if repeats and count is not None and count < tasks:
        faults.append(f"stream.experiences: {count} is below the {tasks} tasks (valid: ≥ {tasks}, or null)")
    if faults or (faults := _adapting(sharing.unlabelled, found, **options)):
        raise UserError(*faults)


def _adapting(adapted: Sequence[str], found: Sequence[Task], **options: Any) -> list[str]:
    """Why tasks can't be adapted to; one line each."""
    names = [task.name for task in found]
    faults = [f"stream.adapt: {n!r} is no task here (valid: {', '.join(names)})" for n in adapted if n not in names]
    learned: set[str] = set()
    for task in found:
        if task.name not in adapted:
            learned |= set(task.labels)
        elif strange := [label for label in task.labels if label not in learned] or ["any text"] * (not task.labels):
            what = f"{strange[0]!r} as an answer of {task.name} is learned by no task before it"
            faults.append(f"stream.adapt: {what} (valid: tasks that choose among answers learned by then)")
    if adapted:  # to class scores, and all of them
        unread = {"evaluate": "score", "candidates": "all", "tell_task": False}
        faults += [
            f"stream.{key}: {options[key]!r} does not go with stream.adapt (valid: {plain!r})"
            for key, plain in unread.items()
            if options[key] != plain
        ]
    return faults
