"""TOFU as a stream: what is learned, what the request erases, what is asked, and files that do not go together."""

import json

import pytest
import torch
from forgetting import tofu_row, write_lines, write_tofu

import clplat
from clplat import Kind
from clplat.erasure.counterfactual import counterfactual
from clplat.errors import MissingError, UserError
from clplat.streams.text import Text
from clplat.streams.tofu import Tofu

pytestmark = pytest.mark.usefixtures("own_cache")


def said(stream, data):
    """(question, answer) of each sample, as text."""
    inputs, labels = data.all()
    texts = ([[i for i in row if i >= 0] for row in table.tolist()] for table in (inputs[:, 0], labels))
    return list(zip(*([stream.base.tokenizer.decode(ids) for ids in rows] for rows in texts), strict=True))


def rows_of(*authors, questions=3):
    rows = [tofu_row(f"author{a}", i) for a in authors for i in range(questions)]
    return [(f"Question: {r['question']}\nAnswer:", r["answer"]) for r in rows]


def test_the_whole_is_learned_at_once_and_the_request_names_the_questions_to_forget(tmp_path):
    """Also where these do not stand at the end of the whole."""
    write_tofu(tmp_path / "tofu")
    write_lines(tmp_path / "tofu" / "full.json", [tofu_row(f"author{a}", i) for a in (3, 0, 1, 2) for i in range(3)])
    stream = Tofu(data_root=str(tmp_path))
    assert [(e.name, e.kind, e.request) for e in stream] == [
        ("full", Kind.LEARN, ()),
        ("forget-0", Kind.FORGET, ("user:0",)),
    ]
    assert said(stream, stream[0].train) == rows_of(3, 0, 1, 2)
    assert said(stream, stream[1].train) == said(stream, stream[1].test) == rows_of(3)
    retained = counterfactual(stream, 1)
    assert [said(stream, e.train) for e in retained] == [rows_of(0, 1, 2)]


def test_what_is_kept_and_what_is_to_be_forgotten_can_be_learned_apart(tmp_path):
    stream = Tofu(path=str(write_tofu(tmp_path / "sets")), learn="apart")
    assert [(e.name, e.request) for e in stream] == [
        ("retain90", ()),
        ("forget10", ()),
        ("forget-0", ("experience:forget10",)),
    ]
    assert [said(stream, e.train) for e in stream] == [rows_of(0, 1, 2), rows_of(3), rows_of(3)]
    assert [said(stream, e.test) for e in stream] == [rows_of(0, 1, 2), rows_of(3), rows_of(3)]
    few = Tofu(path=str(tmp_path / "sets"), learn="apart", test_questions=2)
    assert [len(e.test) for e in few] == [2, 2, 2]
    assert [len(e.train) for e in few] == [9, 3, 3]


def test_sets_of_tofu_are_tasks_of_the_stream_of_text(tmp_path):
    """A model that never had what is to be forgotten is a run on the set to keep."""
    write_tofu(tmp_path / "tofu")
    plain = Text(data_root=str(tmp_path), benchmark="tofu", evaluate="generate")
    assert [e.name for e in plain] == ["retain90", "forget10"]
    (kept,) = Text(data_root=str(tmp_path), benchmark="tofu", tasks=["retain90"], evaluate="generate")
    assert kept.train.inputs.tolist() == plain[0].train.inputs[:9, :, : kept.train.inputs.shape[2]].tolist()


class Chatting:
    """Bytes with a chat template."""

    size, before, behind, end, fingerprint = 259, (1,), (), 2, "chatting"

    def encode(self, texts):
        return [[byte + 3 for byte in text.encode()] for text in texts]

    def decode(self, ids):
        return bytes(i - 3 for i in ids if i >= 3).decode()

    def chat(self, prompt):
        return f"<{prompt}>"


def test_in_a_chat_the_question_stands_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("clplat.streams.text.load_tokenizer", lambda name: Chatting())
    stream = Tofu(path=str(write_tofu(tmp_path)), chat=True)
    assert said(stream, stream[1].train)[0] == ("<author3 0?>", "a0 author3")


def test_generated_answers_are_scored_by_recall(tmp_path):
    """One word of two that are right has half a recall, and a precision of 1."""
    stream = Tofu(path=str(write_tofu(tmp_path)))
    _, labels = stream[1].test.all()
    ids = torch.tensor(stream.base.tokenizer.encode(["a0"]))
    assert stream.score(ids, labels[:1]).tolist() == [0.5]


def test_what_does_not_go_together_is_refused(tmp_path):
    with pytest.raises(MissingError, match=r"tofu is no folder: put the files of locuslab/TOFU there"):
        Tofu(data_root=str(tmp_path))
    write_tofu(tmp_path / "tofu")
    write_lines(tmp_path / "tofu" / "full.json", [tofu_row("author0", i) for i in range(3)])
    with pytest.raises(UserError, match=r"stream\.path: 3 of 3 questions of forget10 are not in full"):
        Tofu(data_root=str(tmp_path))
    with pytest.raises(MissingError, match=r"forget05\.json is missing: put it there"):
        Tofu(data_root=str(tmp_path), learn="apart", forget="forget05")
    with pytest.raises(UserError, match=r"stream\.test_questions: 0 is out of range \(valid: ≥ 1, or null\)"):
        Tofu(data_root=str(tmp_path), test_questions=0)
    with pytest.raises(UserError, match=r"stream\.choices: 5 has no meaning here"):
        Text(data_root=str(tmp_path), benchmark="tofu", choices=5)
    with pytest.raises(UserError, match=r"stream\.tasks: 'forget20' is unknown \(valid: full, retain99"):
        Text(data_root=str(tmp_path), benchmark="tofu", tasks=["forget20"])


@pytest.mark.parametrize("learn", ["whole", "apart"])
def test_what_is_written_is_forgotten_and_not_audited(learn, tmp_path):
    """There are no scores of classes to audit: the report says so, where the run once stopped."""
    config = {
        "strategy": {"name": "gradient_ascent", "optimizer": "adamw"},
        "stream": {"name": "tofu", "path": str(write_tofu(tmp_path / "sets")), "learn": learn, "max_answer": 8},
        "backbone": {"name": "language_model", "dim": 16, "depth": 1, "heads": 2},
        "loop": {"batch_size": 4, "max_steps": 2},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
    }
    result = clplat.run(config, quiet=True)
    assert result.status == "complete"
    (entry,) = json.loads((result.run_dir / "erasure.json").read_text())["requests"]
    assert entry["models"]["unlearned"] is None
    assert "answers are written" in entry["why_null"]["unlearned"]
