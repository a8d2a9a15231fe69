"""Readers of text tasks: the benchmarks' files, their prompts, and what counts as a right answer."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplat.data.tokens import read_json
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
    """

    name: str
    train: list[Row]
    test: list[Row]
    labels: tuple[str, ...] = ()
    metric: str = "exact_match"


def cut(task: Task, classes: int) -> list[Task]:
    """A task in parts of so many classes, numbered from 1; itself where it has no more, or free text."""
    if len(task.labels) <= classes:
        return [task]
    parts = []
    for number, start in enumerate(range(0, len(task.labels), classes), 1):
        labels = task.labels[start : start + classes]
        train, test = ([row for row in rows if row.answers[0] in labels] for rows in (task.train, task.test))
        parts.append(Task(f"{task.name}{number}", train, test, labels, task.metric))
    return parts


# --- files ------------------------------------------------------------------------------------------------------------


def find_rows(folder: Path, part: str) -> list[dict[str, Any]] | None:
    """Rows of `folder`/`part`.jsonl.gz, .jsonl or .json (a list); None where there is no such file.

    Raises:
        MissingError: a file that is not whole.
    """
    for ending in (".jsonl.gz", ".jsonl", ".json"):
        file = folder / f"{part}{ending}"
        if file.is_file():
            return read_rows(file)
    return None


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, gzipped or not, or of a JSON file that holds a list.

    Raises:
        MissingError: a line that is no JSON object, or a file cut short.
    """
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        text = data.decode("utf-8")
        rows = json.loads(text) if file.suffix == ".json" else [json.loads(x) for x in text.split("\n") if x.strip()]
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise MissingError(f"{file} can't be read ({error}): replace it by a whole file") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise MissingError(f"{file} holds no list of JSON objects: replace it by one that does")
    return rows


# --- O-LoRA: the standard benchmark and the 15 tasks ------------------------------------------------------------------

_STARS = ("very negative", "negative", "neutral", "positive", "very positive")
_TRUTH = ("True", "False")
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


def olora_task(root: Path, name: str, instructions: dict[str, str], preamble: bool = True) -> Task:
    """One task of the O-LoRA benchmarks from `root`/olora_text, or from the repository's own CL_Benchmark folder.

    Where only training rows are there, the last fifth is held out; where only test rows are, every fifth of them is,
    and the others are learned. Rows without a gold label are left out.

    Raises:
        MissingError: neither part is there.
    """
    group, dataset, labels = OLORA[name]
    places = [root / "olora_text" / name, root / "CL_Benchmark" / group / dataset]
    parts = {
        part: next((r for p in places if (r := find_rows(p, part)) is not None), None) for part in ("train", "test")
    }
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

    def row(content: dict[str, Any]) -> Row:
        asked = "" if group == "COPA" else f"{instructions[group]}\nOption: {', '.join(labels)} \n"
        before = f"Task:{group}\nDataset:{dataset}\n{asked}" if preamble else ""
        return Row(f"{before}{content['sentence']}\nAnswer:", (content["label"],))

    train, test = ([r for r in rows if r["label"] in labels] for rows in (train, test))
    return Task(name, [row(r) for r in train], [row(r) for r in test], labels)


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
_ASKS = ("prompt", "instruction", "input", "question", "sentence", "text")
_ANSWERS = ("answer", "answers", "output", "outputs", "label", "response", "completion")


def superni_names(root: Path) -> list[str]:
    """Tasks in `root`/superni_text, sorted."""
    return sorted(p.name for p in (root / "superni_text").glob("task*") if p.is_dir())


def superni_task(root: Path, name: str, limit: int) -> Task:
    """One task of SuperNI: its definition, then the input.

    Raises:
        MissingError: it is not there.
    """
    folder = root / "superni_text" / name
    definition = " ".join(read_json(folder / "task.json")["Definition"]).strip()
    metric = "exact_match" if "classification" in name else "rouge_l"

    def row(content: dict[str, Any]) -> Row:
        return Row(f"{definition}\nInput: {content['input'].strip()}\nOutput:", _texts(content["output"]))

    return folder_task(folder, name, limit, row, metric)


def folder_task(folder: Path, name: str, limit: int, row: Callable[[dict[str, Any]], Row], metric: str) -> Task:
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
    return _task(name, [row(r) for r in rows["train"] or ()], [row(r) for r in rows["test"] or ()], limit, metric)


def file_task(file: Path, limit: int, metric: str) -> Task:
    """A task from one file, of which every fifth row is held out."""
    rows = [plain_row(r) for r in read_rows(file)]
    return _task(file.name.partition(".")[0], [r for i, r in enumerate(rows) if i % 5 != 4], rows[4::5], limit, metric)


def plain_row(content: dict[str, Any]) -> Row:
    """A row of {prompt, answer}, {instruction, input, output} or a like pair of names.

    Raises:
        UserError: it has neither.
    """
    asked = [str(content[k]) for k in _ASKS if content.get(k)]
    asked = asked[:1] if content.get("prompt") else asked
    answer = next((content[k] for k in _ANSWERS if k in content), None)
    if not asked or answer is None:
        raise UserError(
            f"stream.path: a row has {', '.join(content) or 'nothing'} (valid: one of {', '.join(_ASKS)} and one of "
            f"{', '.join(_ANSWERS)})"
        )
    return Row("\n".join(asked), _texts(answer))


def _task(name: str, train: list[Row], test: list[Row], limit: int, metric: str) -> Task:
    different = sorted({row.answers[0] for row in train})
    labels = tuple(different) if len(different) <= limit and 2 * len(different) <= len(train) else ()
    if labels:
        test = [row for row in test if row.answers[0] in labels]
    return Task(name, train, test, labels, metric)


def _texts(value: Any) -> tuple[str, ...]:
    return tuple(str(v).strip() for v in value) if isinstance(value, list) else (str(value).strip(),)
