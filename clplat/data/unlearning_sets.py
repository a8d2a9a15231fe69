"""What unlearning of language models is measured on: questions and texts of TOFU and MUSE, from the files as published.

TOFU   Maini et al., COLM 2024, arXiv:2401.06121; the set locuslab/TOFU on the Hugging Face hub. A file a set, called
       .json and holding JSON lines: full, retain90, retain95, retain99, forget01, forget05, forget10, holdout01,
       holdout05, holdout10 {question, answer}; forget01_perturbed, forget05_perturbed, forget10_perturbed and
       retain_perturbed, which also have {paraphrased_answer, paraphrased_question, perturbed_answer: a list};
       real_authors_perturbed and world_facts_perturbed {question, answer, perturbed_answer}; real_authors and
       world_facts {question, answer, option1 to option4}.
MUSE   Shi et al., ICLR 2025, arXiv:2407.06460; the sets muse-bench/MUSE-News and MUSE-Books on the hub, in the folder
       data/ of their repository bbc and hp. A folder a subset, a file a split: verbmem/forget {prompt, gt};
       knowmem/forget_qa, retain_qa, forget_qa_icl, retain_qa_icl {question, answer}; privleak/forget, retain2, holdout
       and raw/forget, retain1, retain2, holdout {text}, in the repository's .json a list of bare texts. Its retain2_qa
       and retain2_qa_icl are what the hub calls retain_qa and retain_qa_icl.

Each may also be .jsonl, .csv or .parquet, in one file or in the hub's parts. Other fields than those read are left
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplat.data.datasets import find_path
from clplat.data.rows import find_rows, read_rows
from clplat.errors import MissingError, UserError

SHARES = ("01", "05", "10")  # per cent of TOFU's authors that are to be forgotten
TOFU = (
    "full",
    *(f"retain{100 - int(share)}" for share in SHARES),
    *(f"{part}{share}" for part in ("forget", "holdout") for share in SHARES),
    *("real_authors", "world_facts"),
)
PERTURBED = (*(f"forget{share}" for share in SHARES), "retain", "real_authors", "world_facts")  # with _perturbed behind
_PARAPHRASED = ("forget", "retain")  # how sets begin that have a paraphrase of the right answer
_OTHERWISE = {"retain_qa": "retain2_qa", "retain_qa_icl": "retain2_qa_icl"}  # on the hub, and in the repository
_FROM = {
    "tofu": "the files of locuslab/TOFU",
    "muse": "the files of muse-bench/MUSE-News or MUSE-Books",
}


@dataclass(frozen=True)
class Question:
    """A question, its right answer, a paraphrase of that where there is one, and wrong answers of the same form."""

    question: str
    answer: str
    paraphrase: str | None = None
    wrong: tuple[str, ...] = ()


def find_sets(benchmark: str, path: str | Path | None, data_root: str | Path | None) -> Path:
    """The folder of a benchmark, tofu or muse: `path`, or else the folder of its name, as it is or in the data root.

    Raises:
        MissingError: it is not there.
    """
    folder = find_path(str(benchmark if path is None else path), None if data_root is None else str(data_root))
    if not folder.is_dir():
        raise MissingError(f"{folder} is no folder: put {_FROM[benchmark]} there")
    return folder


def asked(question: str, chat: bool) -> str:
    """What a model is asked: the question alone in a chat, else with words before and behind it, as TOFU asks models
    that know no conversation, and MUSE all."""
    return question if chat else f"Question: {question}\nAnswer:"


def tofu(folder: Path, name: str) -> list[Question]:
    """Questions of the set called `name`, one of `TOFU`, or of `PERTURBED` with `_perturbed` behind it.

    Raises:
        MissingError: it is not there, or not whole.
        UserError: a row is not in the published form.
    """
    rows, found = _rows(folder, [name, f"{name}/train"], f"{name}.json", "tofu"), []
    for where, row in rows:
        question, answer = (_text(row, key, where) for key in ("question", "answer"))
        paraphrase: str | None = None
        wrong: tuple[str, ...] = ()
        if name.endswith("_perturbed"):
            wrong = _texts(row, "perturbed_answer", where)
            if name.startswith(_PARAPHRASED):
                paraphrase = _text(row, "paraphrased_answer", where)
        found.append(Question(question, answer, paraphrase, wrong))
        if len(wrong) != len(found[0].wrong):
            raise UserError(
                f"{where} has {len(wrong)} of perturbed_answer (valid: {len(found[0].wrong)}, as the first row)"
            )
    return found


def muse_questions(folder: Path, split: str) -> list[Question]:
    """Questions of knowmem: forget_qa, retain_qa, forget_qa_icl or retain_qa_icl; of verbmem: forget, the question
    being what a text begins with and the answer how it goes on. Raises as `tofu` does."""
    if split == "forget":
        rows, keys = _rows(folder, ["verbmem/forget"], "verbmem/forget.json", "muse"), ("prompt", "gt")
    else:
        names = [f"knowmem/{name}" for name in (split, _OTHERWISE.get(split)) if name is not None]
        rows, keys = _rows(folder, names, f"knowmem/{split}.json", "muse"), ("question", "answer")
    return [Question(_text(row, keys[0], where), _text(row, keys[1], where)) for where, row in rows]


def muse_texts(folder: Path, split: str) -> list[str]:
    """Texts of a split such as privleak/forget or raw/retain1. Raises as `tofu` does."""
    return [_text(row, "text", where) for where, row in _rows(folder, [split], f"{split}.json", "muse", bare="text")]


def _rows(
    folder: Path, names: Sequence[str], published: str, benchmark: str, bare: str | None = None
) -> list[tuple[str, dict[str, Any]]]:
    """Rows of the first of `names` that is there, each with the words for it in messages."""
    for name in names:
        place = folder / name
        rows = find_rows(place.parent, place.name, bare)
        if rows is None and (parts := _parts(place)):
            rows = [row for part in parts for row in read_rows(part, bare)]
        if rows is not None:
            if not rows:
                raise MissingError(f"{place} has no rows: replace it by a whole file")
            return [(f"{place}: row {number}", row) for number, row in enumerate(rows, 1)]
    what = f"put it there, or .jsonl or .parquet, of {_FROM[benchmark]}"
    raise MissingError(f"{folder / published} is missing: {what}")


def _parts(place: Path) -> list[Path]:
    """The hub's files of a split: NAME-00000-of-00002.parquet and so on, or NAME/0000.parquet.

    Raises:
        MissingError: one of them is not there.
    """
    found = sorted(place.parent.glob(f"{place.name}-*-of-*.parquet"))
    if found:
        count = int(found[0].stem.rpartition("-")[2])
        wanted = [place.with_name(f"{place.name}-{i:05}-of-{count:05}.parquet") for i in range(count)]
        if lacking := [part for part in wanted if part not in found]:
            raise MissingError(f"{lacking[0]} is missing: put all {count} parts there")
        return wanted
    return sorted(place.glob("[0-9]*.parquet"))


def _text(row: dict[str, Any], key: str, where: str) -> str:
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where} has {_shown(value)} as {key} (valid: text)")
    return value


def _texts(row: dict[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = row.get(key)
    if not isinstance(value, list) or not value or not all(isinstance(v, str) and v.strip() for v in value):
        raise UserError(f"{where} has {_shown(value)} as {key} (valid: a list of texts)")
    return tuple(value)


def _shown(value: object) -> str:
    return "nothing" if value is None else repr(value)[:60]
