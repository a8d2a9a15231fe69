"""Readers of text tasks: the benchmarks' files, their prompts, and what counts as a right answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplat.data.rows import find_rows, read_rows
from clplat.data.tokens import read_json
from clplat.data.unlearning_sets import asked, tofu
from clplat.errors import MissingError, UserError


@dataclass(frozen=True)
class Row:
    """One sample: what is asked, and the answers that are right, of which the first is learned."""

    prompt: str
    answers: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Task:
    """One task.

    Args:
        name: short and unique.
        train: samples to learn from.
        test: held-out samples.
        labels: the answers to choose from, in the order the prompt has them; empty where any text may be one.
        metric: of a generated answer, a name of `clplat.metrics.text.TEXT_METRICS`.
        notes: what was left out of it, a line each.
    """

    name: str
    train: list[Row]
    test: list[Row]
    labels: tuple[str, ...] = ()
    metric: str = "exact_match"
    notes: tuple[str, ...] = ()


Reader = Callable[[dict[str, Any], str], Row]  # a row, and which it is, for messages


def cut(task: Task, classes: int | None) -> list[Task]:
    """A task in parts of so many classes, numbered from 1; itself where it has no more, or free text."""
    if classes is None or len(task.labels) <= classes:
        return [task]
    parts = []
    for number, start in enumerate(range(0, len(task.labels), classes), 1):
        labels = task.labels[start : start + classes]
        train, test = ([row for row in rows if row.answers[0] in labels] for rows in (task.train, task.test))
        parts.append(Task(f"{task.name}{number}", train, test, labels, task.metric, task.notes))
    return parts


# --- O-LoRA: the standard benchmark and the 15 tasks ------------------------------------------------------------------

_STARS = ("very negative", "negative", "neutral", "positive", "very positive")
_TRUTH = ("True", "False")
_NO_GOLD = ("-", "", None)  # what the sets of natural language inference write where annotators disagreed
_ENTAILMENT = ("neutral", "entailment", "contradiction")
# Task → group and name in the prompt, and labels in the order of its options.
OLORA: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "dbpedia": ("TC", "dbpedia", ("Company", "Educational Institution", "Artist", "Athlete", "Office Holder",
                                  "Mean of Transportation", "Building", "Natural Place", "Village", "Animal", "Plant",
                                  "Album", "Film", "Written Work")),
    "amazon": ("SC", "amazon", _STARS),
    "yahoo": ("TC", "yahoo", ("Society & Culture", "Science & Mathematics", "Health", "Education & Reference",
                              "Computers & Internet", "Sports", "Business & Finance", "Entertainment & Music",
                              "Family & Relationships", "Politics & Government")),
    "agnews": ("TC", "agnews", ("World", "Sports", "Business", "Science or Technology")),
    "yelp": ("SC", "yelp", _STARS),
    "mnli": ("NLI", "MNLI", _ENTAILMENT),
    "cb": ("NLI", "CB", ("entailment", "contradiction", "neutral")),
    "wic": ("WiC", "WiC", _TRUTH),
    "copa": ("COPA", "COPA", ("A", "B")),
    "qqp": ("QQP", "QQP", ("False", "True")),
    "boolqa": ("BoolQA", "BoolQA", _TRUTH),
    "rte": ("NLI", "RTE", ("contradiction", "entailment")),
    "imdb": ("SC", "IMDB", ("Good", "Bad")),
    "sst2": ("SC", "SST-2", ("Good", "Bad")),
    "multirc": ("MultiRC", "MultiRC", ("False", "True")),
}  # fmt: skip
ORDERS: dict[int, tuple[str, ...]] = {
    number: tuple(text.split())
    for number, text in {
        1: "dbpedia amazon yahoo agnews",
        2: "dbpedia amazon agnews yahoo",
        3: "yahoo amazon agnews dbpedia",
        4: "mnli cb wic copa qqp boolqa rte imdb yelp amazon sst2 dbpedia agnews multirc yahoo",
        5: "multirc boolqa wic mnli cb copa qqp rte imdb sst2 dbpedia agnews yelp amazon yahoo",
        6: "yelp amazon mnli cb copa qqp rte imdb sst2 dbpedia agnews yahoo multirc boolqa wic",
    }.items()
}
# What a group asks for, in our words; the published lines come with `stream.instructions`.
_ASKED = {
    "NLI": "How do these two sentences relate to each other? Choose one of the options.",
    "QQP": "Do these two questions mean the same? Choose one of the options.",
    "SC": "Which sentiment does this text express? Choose one of the options.",
    "TC": "What is this text about? Choose one of the options.",
    "BoolQA": "Is the statement in the question true by the passage? Choose one of the options.",
    "MultiRC": "Is the answer to the question true by the paragraph? Choose one of the options.",
    "WiC": "Does the word mean the same in both sentences? Choose one of the options.",
}


def instruction_lines(file: Path | None) -> dict[str, str]:
    """Group → its instruction: ours, or the first zero-shot line of each group in a file of the benchmark's format.

    Raises:
        MissingError: the file is not there or not whole.
        UserError: it lacks a group.
    """
    if file is None:
        return _ASKED
    try:
        lists: dict[str, list[dict[str, str]]] = read_json(file)
        found = {
            group: next(e["instruction"] for e in entries if e["instruction_type"] == "zero-shot")
            for group, entries in lists.items()
        }
    except (StopIteration, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"stream.instructions: {file} is not in the benchmark's format ({error!r})") from error
    lacking = [group for group in _ASKED if group not in found]
    if lacking:
        raise UserError(f"stream.instructions: {file} lacks {', '.join(lacking)}")
    return {group: line.rstrip("\n") for group, line in found.items()}


def olora_task(root: Path, name: str, instructions: dict[str, str], cue: bool = True, preamble: bool = True) -> Task:
    """One task of the O-LoRA benchmarks from `root`/olora_text, or from the repository's own CL_Benchmark folder.

    Where only training rows are there, the last fifth is held out; where only test rows are, every fifth of them is,
    and the others are learned. Rows without a gold label are left out.

    Raises:
        MissingError: neither part is there.
    """
    group, dataset, labels = OLORA[name]
    places = [root / "olora_text" / name, root / "CL_Benchmark" / group / dataset]
    found = [{part: find_rows(place, part) for part in ("train", "test")} for place in places]
    parts = next((f for f in found if any(rows is not None for rows in f.values())), {"train": None, "test": None})
    train, test = parts["train"], parts["test"]
    if train is None and test is None:
        raise MissingError(
            f"stream.tasks: {name} is missing: put {places[0]}/train.jsonl.gz and test.jsonl.gz there (one "
            f'{{"label", "sentence"}} a line), or the benchmark\'s {places[1]}/train.json and test.json; or leave the '
            "task out: --stream.absent skip"
        )
    if train is None:
        assert test is not None
        train, test = [r for i, r in enumerate(test) if i % 5 != 4], test[4::5]
    elif test is None:
        kept = len(train) - len(train) // 5
        train, test = train[:kept], train[kept:]

    def row(content: dict[str, Any], where: str) -> Row:
        known = fields(content, where, ("sentence", "label"))
        if known["label"] not in (*labels, *_NO_GOLD):
            raise UserError(f"stream.tasks: {where}: label {known['label']!r} is unknown (valid: {', '.join(labels)})")
        asked = "" if group == "COPA" else f"{instructions[group]}\nOption: {', '.join(labels)} \n"
        before = f"Task:{group}\nDataset:{dataset}\n{asked}" if preamble else ""
        return Row(f"{before}{known['sentence']}" + "\nAnswer:" * cue, (known["label"],))

    golden, notes = dict[str, list[Row]](), list[str]()
    for part, rows in (("train", train), ("test", test)):
        made = rows_of(rows, f"{name} {part}", row)
        golden[part] = [r for r in made if r.answers[0] in labels]
        if len(golden[part]) < len(made):
            without = len(made) - len(golden[part])
            notes.append(f"stream.tasks: {without} of {len(made)} {part} rows of {name} have no gold label: left out")
    return Task(name, golden["train"], golden["test"], labels, notes=tuple(notes))


# --- SuperNI, TRACE, and instruction sets of one's own ----------------------------------------------------------------

TRACE = {
    "C-STANCE": "choice",
    "FOMC": "choice",
    "MeetingBank": "rouge_l",
    "Py150": "similarity",
    "ScienceQA": "choice",
    "NumGLUE-cm": "exact_match",
    "NumGLUE-ds": "exact_match",
    "20Minuten": "rouge_l",
}
BESIDE_TRACE = {"MedMCQA": "choice", "JEC-QA": "choice"}  # two more that I-LoRA's stream has
# Fields of a row, each of which is used or refused: one that asks alone, or several that ask together, in this order.
_ALONE = ("prompt", "sentence", "text")
_TOGETHER = ("instruction", "context", "passage", "input", "question")
_ANSWERS = ("answer", "answers", "output", "outputs", "label", "response", "completion")
_NUMBERS = ("id", "idx", "index", "uid", "guid", "qid")  # what a row is called; not read


def superni_names(root: Path) -> list[str]:
    """Tasks in `root`/superni_text, sorted."""
    return sorted(p.name for p in (root / "superni_text").glob("task*") if p.is_dir())


def superni_task(root: Path, name: str, limit: int, asked_for: bool = True) -> Task:
    """One task of SuperNI: its definition, then the input; or the input alone where no answer in words is asked for.

    Raises:
        MissingError: it is not there.
    """
    folder = root / "superni_text" / name
    definition = read_json(folder / "task.json").get("Definition")
    if not isinstance(definition, list):
        raise MissingError(f"{folder / 'task.json'} has no list Definition: replace it by a whole file")
    asked = " ".join(definition).strip()
    metric = "exact_match" if "classification" in name else "rouge_l"

    def row(content: dict[str, Any], where: str) -> Row:
        known = fields(content, where, ("input", "output"))
        given = _text(known, "input", where).strip()
        return Row(f"{asked}\nInput: {given}\nOutput:" if asked_for else given, _texts(known, "output", where))

    return folder_task(folder, name, limit, row, metric)


def tofu_task(folder: Path, name: str, chat: bool) -> Task:
    """A set of TOFU's questions, which are asked as they are learned: it has none that are held out.

    Raises:
        MissingError: it is not there.
    """
    rows = [Row(asked(q.question, chat), (q.answer,)) for q in tofu(folder, name)]
    return Task(name, rows, rows, metric="rouge_l_recall")


def folder_task(folder: Path, name: str, limit: int, row: Reader, metric: str) -> Task:
    """A task from train and test files of one folder; a choice where there are at most `limit` answers.

    Raises:
        MissingError: a file is not there.
    """
    rows = {part: find_rows(folder, part) for part in ("train", "test")}
    for part, found in rows.items():
        if not found:
            raise MissingError(
                f"stream.tasks: {name} is missing: put {folder / part}.jsonl (or .json, .jsonl.gz) there"
            )
    train, test = (rows_of(rows[part] or [], f"{name} {part}", row) for part in ("train", "test"))
    return _task(name, train, test, limit, metric)


def file_task(file: Path, limit: int, metric: str) -> Task:
    """A task from one file, of which every fifth row is held out."""
    name = file.name.partition(".")[0]
    rows = rows_of(read_rows(file), name, plain_row)
    return _task(name, [r for i, r in enumerate(rows) if i % 5 != 4], rows[4::5], limit, metric)


def rows_of(contents: list[dict[str, Any]], name: str, row: Reader) -> list[Row]:
    """Samples of the rows of a file; `name` is of task and part, for messages."""
    return [row(content, f"row {number} of {name}") for number, content in enumerate(contents, 1)]


def plain_row(content: dict[str, Any], where: str) -> Row:
    """A row of {prompt, answer}, {instruction, input, output} or a like pair of names.

    Raises:
        UserError: it lacks one of both, or has a field that would not be used.
    """
    asks = [k for k in (*_ALONE, *_TOGETHER) if content.get(k) not in (None, "")]
    answers = [k for k in _ANSWERS if k in content]
    if not asks or len(answers) != 1 or (len(asks) > 1 and asks[0] in _ALONE):
        raise UserError(
            f"stream.path: {where} has {', '.join(content) or 'nothing'} (valid: one of {', '.join(_ALONE)}, or some "
            f"of {', '.join(_TOGETHER)}; and one of {', '.join(_ANSWERS)})"
        )
    fields(content, where, (*asks, *answers), spare=(*_ALONE, *_TOGETHER))
    return Row("\n".join(_text(content, k, where) for k in asks), _texts(content, answers[0], where))


def fields(content: dict[str, Any], where: str, names: Sequence[str], spare: Sequence[str] = ()) -> dict[str, Any]:
    """A row, which must have the fields `names` and no other but numbers and empty ones of `spare`.

    Raises:
        UserError: it lacks one, or has one that would not be used.
    """
    lacking = [name for name in names if name not in content]
    unused = [k for k in content if k not in (*names, *_NUMBERS) and not (k in spare and content[k] in (None, ""))]
    if lacking or unused:
        fault = f"lacks {', '.join(lacking)}" if lacking else f"has {', '.join(unused)}, which would not be used"
        raise UserError(f"stream.path: {where} {fault} (valid: {', '.join((*names, *_NUMBERS))})")
    return content


def _task(name: str, train: list[Row], test: list[Row], limit: int, metric: str) -> Task:
    """A choice where every row has one right answer, there are at most `limit`, and half as many as training rows."""
    different = sorted({row.answers[0] for row in train})
    one = all(len(row.answers) == 1 for row in (*train, *test))
    labels = tuple(different) if one and len(different) <= limit and 2 * len(different) <= len(train) else ()
    unseen = [row.answers[0] for row in test if labels and row.answers[0] not in labels]
    if unseen:
        raise UserError(
            f"stream.path: {len(unseen)} of {len(test)} test rows of {name} have an answer that no training row has, "
            f"as {unseen[0]!r} (valid: {', '.join(labels)}; or free text, by stream.choices 1 and stream.evaluate "
            "generate)"
        )
    return Task(name, train, test, labels, metric)


def _text(content: dict[str, Any], key: str, where: str) -> str:
    """A field that is text, or a number or truth value."""
    value = content[key]
    if not isinstance(value, str | int | float):
        raise UserError(f"stream.path: {where} has a {type(value).__name__} as {key} (valid: text)")
    return str(value)


def _texts(content: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    """The different right answers in a field: one, a list of them, or {text: list} as SQuAD has it."""
    value = content[key]
    if isinstance(value, dict) and set(value) <= {"text", "answer_start"}:
        value = value.get("text")
    values = value if isinstance(value, list) else [value]
    if not values or any(isinstance(v, list | dict) or v is None for v in values):
        raise UserError(
            f"stream.path: {where} has {content[key]!r} as {key} (valid: an answer, or a list of at least one)"
        )
    found = tuple(dict.fromkeys(str(v).strip() for v in values))
    if "" in found:
        raise UserError(f"stream.path: {where} has an empty {key} (valid: an answer)")
    return found
