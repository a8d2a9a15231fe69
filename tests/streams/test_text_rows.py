"""Text streams from rows of one's own: every field is used or refused, answers, files, options."""

from pathlib import Path

import pytest
import torch
from reading import read
from texts import write

from clplat.errors import MissingError, UserError
from clplat.streams.text import Text

pytestmark = pytest.mark.usefixtures("own_cache")


def _rows(sets: Path, name: str, train: list, test: list | None = None, **options):
    write(sets / name, "train", train)
    write(sets / name, "test", train if test is None else test)
    return Text(benchmark="jsonl", path=str(sets), tasks=[name], **options)


QA = [{"id": i, "question": f"when? {i}", "context": "Ada was born in 1815.", "answer": str(i % 2)} for i in range(8)]


def test_every_field_of_a_row_is_used_or_refused(sets):
    stream = _rows(sets, "qa", QA)
    assert read(stream, stream[0].train, 3)[:2] == ("Ada was born in 1815.\nwhen? 3", "1")
    squad = [{"question": "q", "answers": {"text": [str(i % 2)] * 3, "answer_start": [0, 1, 2]}} for i in range(8)]
    assert _rows(sets, "squad", squad).class_names == ("0", "1")
    alpaca = [{"instruction": "do", "input": "", "output": "ab"[i % 2]} for i in range(8)]
    stream = _rows(sets, "alpaca", alpaca)
    assert read(stream, stream[0].train, 1)[:2] == ("do", "b")
    assert read(s := _rows(sets, "zero", [{"input": 0, "label": i % 2} for i in range(8)]), s[0].train, 1)[0] == "0"
    for row, message in (
        ({**QA[0], "options": ["a", "b"]}, r"row 9 of odd train has options, which would not be used"),
        (
            {"prompt": "p", "input": "i", "answer": "0"},
            r"row 9 of odd train has prompt, input, answer \(valid: one of pro",
        ),
        ({"prompt": "p", "answer": "0", "label": "1"}, r"row 9 of odd train has prompt, answer, label"),
        ({"prompt": ["p"], "answer": "0"}, r"row 9 of odd train has a list as prompt \(valid: text\)"),
        ({"prompt": "p", "answer": []}, r"row 9 of odd train has \[\] as answer \(valid: an answer"),
        ({"prompt": "p", "answer": None}, r"row 9 of odd train has None as answer"),
        ({"prompt": "p", "answer": " "}, r"row 9 of odd train has an empty answer"),
        ({"prompt": "p", "answer": {"a": 1}}, r"row 9 of odd train has \{'a': 1\} as answer"),
        ({"prompt": "p"}, r"row 9 of odd train has prompt \(valid"),
    ):
        with pytest.raises(UserError, match=message):
            _rows(sets, "odd", [{"prompt": f"p{i}", "answer": str(i % 2)} for i in range(8)] + [row])


def test_a_test_row_with_an_answer_of_its_own_is_refused_and_with_several_the_task_is_free(sets):
    train = [{"prompt": f"q{i}", "answer": ("yes", "no")[i % 2]} for i in range(8)]
    test = [*train[:2], {"prompt": "z", "answer": "maybe"}]
    with pytest.raises(UserError, match=r"1 of 3 test rows of odd have an answer that no training row has, as 'maybe'"):
        _rows(sets, "odd", train, test)
    free = _rows(sets, "odd", train, test, choices=1, evaluate="generate")
    assert free._right(free[0].test.targets()[2].tolist()) == [("rouge_l", "maybe")]
    with pytest.raises(UserError, match="those of odd are free text"):
        _rows(sets, "odd", train, [{"prompt": "z", "answer": ["yes", "no"]}])


def test_samples_with_the_same_first_answer_keep_their_own_right_texts(sets):
    rows = [{"prompt": "one", "answer": ["same", "first"]}, {"prompt": "two", "answer": ["same", "second"]}]
    stream = _rows(sets, "own", rows, evaluate="generate")
    labels = stream[0].test.targets()
    assert [[t for _, t in stream._right(row)] for row in labels.tolist()] == [["same", "first"], ["same", "second"]]
    ids = torch.tensor([stream.tokenizer.encode(["second"])[0]] * 2)
    assert stream.score(ids, labels).tolist() == [0, 1]
    assert [[t for _, t in stream._right(row)] for row in stream[0].train.targets().tolist()][1] == ["same", "second"]


def test_answers_that_are_too_long_or_alike_are_refused_or_said(sets):
    long = [{"prompt": f"q{i}", "answer": ("a long answer", "a long anchor")[i % 2]} for i in range(8)]
    with pytest.raises(
        UserError, match=r"stream\.max_answer: 9 is below the 14 tokens .* 'a long anchor' .* \(valid: ≥ 14"
    ):
        _rows(sets, "long", long, max_answer=9)
    assert _rows(sets, "long", long, max_answer=14).notes == ()
    said = _rows(sets, "long", long, max_answer=9, choices=1, evaluate="generate")
    line = "stream.max_answer: 8 of 8 free answers are learned up to their first 8 tokens (the longest has 13)"
    assert said.notes == (line, line)
    signs = [{"prompt": f"q{i}", "answer": "+-"[i % 2]} for i in range(8)]
    assert _rows(sets, "signs", signs).class_names == ("+", "-")
    with pytest.raises(UserError, match=r"stream\.evaluate: generate can't tell the answer '\+' from ''"):
        _rows(sets, "signs", signs, evaluate="generate")


def test_csv_and_parquet_are_read_like_jsonl(sets, tmp_path):
    rows = [{"text": f'a "quoted", text {i}\nof two lines', "label": "xy"[i % 2]} for i in range(10)]
    lines = [row["text"].replace('"', '""') for row in rows]
    content = "text,label\r\n" + "".join(f'"{line}",{r["label"]}\r\n' for line, r in zip(lines, rows, strict=True))
    (tmp_path / "mine.csv").write_text("\ufeff" + content, newline="")
    of_csv = Text(benchmark="jsonl", path=str(tmp_path / "mine.csv"))
    assert read(of_csv, of_csv[0].train, 1)[:2] == (rows[1]["text"], "y")
    assert (len(of_csv[0].train), len(of_csv[0].test)) == (8, 2)
    (tmp_path / "mine.csv").write_text("text,label\na,b,c\n")
    with pytest.raises(MissingError, match=r"mine\.csv can't be read \(row 1 has not the 2 columns"):
        Text(benchmark="jsonl", path=str(tmp_path / "mine.csv"))
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    (sets / "table").mkdir()
    for part in ("train", "test"):
        parquet.write_table(pyarrow.Table.from_pylist(rows), sets / "table" / f"{part}.parquet")
    of_parquet = Text(benchmark="jsonl", path=str(sets), tasks=["table"])
    found = [read(of_parquet, of_parquet[0].train, i)[:2] for i in range(10)]
    assert found == [(row["text"], row["label"]) for row in rows]
    write(sets / "table", "train", [])
    with pytest.raises(UserError, match=r"table has train\.jsonl and train\.parquet \(valid: one of them\)"):
        Text(benchmark="jsonl", path=str(sets), tasks=["table"])


def test_options_that_would_not_be_read_are_refused(sets):
    of_sets = {"benchmark": "jsonl", "path": str(sets)}
    for options, key in (
        ({**of_sets, "order": 2}, "order"),
        ({**of_sets, "preamble": False}, "preamble"),
        ({"order": 2, "tasks": ["cb"]}, "order"),
        ({"choices": 5}, "choices"),
        ({**of_sets, "tasks": []}, "tasks"),
        ({**of_sets, "tasks": ["size", "size"]}, "tasks"),
        ({**of_sets, "chat": True, "tasks": ["size"]}, "chat"),
        ({**of_sets, "answer": "class", "chat": True}, "chat"),
        ({**of_sets, "answer": "class", "candidates": "prompt"}, "candidates"),
        ({**of_sets, "answer": "class", "max_answer": 9}, "max_answer"),
        ({**of_sets, "answer": "label"}, "answer"),
        ({**of_sets, "evaluate": "generate", "tell_task": True}, "tell_task"),
    ):
        with pytest.raises(UserError, match=rf"stream\.{key}: "):
            Text(**options)
