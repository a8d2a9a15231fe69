"""What a stream of free text lets a strategy do with written answers: they are judged, and asked for in other words."""

import re

import pytest
import torch
from texts import write

import clplat
from clplat.backbones.language_model import LanguageModel, language_model
from clplat.config.resolve import resolve
from clplat.errors import UserError
from clplat.run.build import build
from clplat.streams._text_written import Written
from clplat.streams.text import Text

pytestmark = pytest.mark.usefixtures("own_cache")

FORM = "Of: {prompt} Say again: {answer} {0} {prompt"


def free(sets, **options):
    how = {"path": str(sets), "tasks": ["free"], "evaluate": "generate", "max_length": 64, "max_answer": 12, **options}
    return Text(benchmark="jsonl", **how)


def ids(stream, *texts):
    rows = [stream.tokenizer.encode([text])[0] for text in texts]
    return torch.tensor([row + [-1] * (8 - len(row)) for row in rows])


def test_answers_are_judged_as_in_evaluation(sets):
    stream = free(sets)
    labels = stream[0].train.targets()[:3]
    answers = ids(stream, "it is 0", "t1", "no")
    scores = stream.writing.score(answers, labels)
    assert torch.equal(scores, stream.score(answers, labels))
    assert scores[0] == 1  # the second of its right answers
    assert scores[2] == 0


def test_what_asks_for_other_words_holds_prompt_and_answer(sets):
    stream = free(sets)
    rows, inputs = stream.writing.rewriting(stream[0].train.targets()[:2], FORM, 1000)
    assert rows.tolist() == [0, 1]
    assert inputs.dtype == torch.int32
    assert (inputs[:, 1] == -1).all()
    said = [stream.tokenizer.decode([i for i in row if i >= 0]) for row in inputs[:, 0].tolist()]
    assert said == [f"Of: Name it.\nthing {i} Say again: t{i} {{0}} {{prompt" for i in range(2)]
    assert (inputs[:, 0, 0] == stream.tokenizer.before[0]).all()


def test_texts_that_look_like_a_place_stay_as_they_are(tmp_path):
    row = {"prompt": "what is {answer}?", "answer": "{prompt} \\1"}
    for part in ("train", "test"):
        write(tmp_path / "free", part, [row])
    stream = free(tmp_path, choices=1)
    inputs = stream.writing.rewriting(stream[0].train.targets(), "{prompt}: {answer}", 1000)[1]
    assert stream.tokenizer.decode([i for i in inputs[0, 0].tolist() if i >= 0]) == "what is {answer}?: {prompt} \\1"


def test_a_prompt_is_left_out_where_it_has_too_many_tokens_and_is_never_cut(tmp_path):
    texts = ["a" * n for n in (5, 200, 6)]
    for part in ("train", "test"):
        write(tmp_path / "free", part, [{"prompt": text, "answer": f"{i} it is"} for i, text in enumerate(texts)])
    stream = free(tmp_path, choices=1)
    labels = stream[0].train.targets()
    rows, inputs = stream.writing.rewriting(labels, "{prompt}{answer}", 14)  # one begins it
    assert rows.tolist() == [0, 2]
    assert (inputs[:, 0] >= 0).sum(1).tolist() == [13, 14]
    assert stream.writing.rewriting(labels, "{prompt}{answer}", 13)[0].tolist() == [0]
    assert (stream.writing.rewriting(labels[1:2], "{prompt}{answer}", 1000)[1] >= 0).sum() == 208
    none = stream.writing.rewriting(labels, "{prompt}{answer}", 1)
    assert [len(part) for part in none] == [0, 0]


def test_test_samples_are_not_known_to_it(sets):
    stream = free(sets)
    assert isinstance(stream.writing, Written)
    assert len(stream.writing.right) == len(stream.writing.prompts) == 30
    for ask in (stream.writing.score, lambda a, y: stream.writing.rewriting(y, FORM, 1000)):
        with pytest.raises(IndexError):
            ask(ids(stream, "t0"), stream[0].test.targets()[:1])


def test_a_stream_of_classes_has_none(sets):
    assert free(sets, tasks=["color"], evaluate="score").writing is None
    assert free(sets, tasks=["color"]).writing is None


@pytest.mark.parametrize(("family", "room"), [("llama", 2048 - 12), ("t5", float("inf"))])
def test_a_prompt_has_the_room_that_its_answer_leaves(sets, family, room):
    stream = free(sets)
    model = language_model(stream.input_shape, family=family, dim=16, depth=1, heads=2).assemble(None, stream.answers)
    assert model.room == room


def config(sets, tmp_path, **stream):
    return {
        "strategy": {"name": "s3ft", "lr": 0.01},
        "stream": {"name": "text", "benchmark": "jsonl", "path": str(sets), **stream},
        "backbone": {"name": "language_model", "dim": 16, "depth": 1, "heads": 2},
        "loop": {"batch_size": 8, "max_epochs": 1, "checkpoint_seconds": None},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
    }


@pytest.mark.filterwarnings("ignore:strategy:UserWarning")
def test_s3ft_learns_what_it_writes_and_what_is_given(sets, tmp_path, monkeypatch):
    asked = {"tasks": ["color", "free"], "evaluate": "generate", "max_answer": 8}
    right = []

    def judged(self, answers, labels):  # every third answer is right, if it ends
        right.append(torch.arange(len(labels)) % 3 == 0)
        return right[-1].float()

    monkeypatch.setattr(Written, "score", judged)
    plain = LanguageModel.generate
    cut = lambda *given: torch.nn.functional.pad(plain(*given)[:, :-1], (0, 1), value=-1)  # noqa: E731
    monkeypatch.setattr(LanguageModel, "generate", cut)
    result = clplat.run(config(sets, tmp_path, **asked), quiet=True)
    assert result.summary["status"] == "complete"
    lines = [line for line in (result.run_dir / "metrics.jsonl").read_text().splitlines() if "strategy/own" in line]
    assert len(lines) == 2
    found = [float(re.search(r'"strategy/own": ([0-9.]+)', line)[1]) for line in lines]
    assert found == pytest.approx([4 / 12, 10 / 30])
    assert len(right) == 4  # own and rewritten, of each experience


def test_s3ft_refuses_answers_to_choose_from_before_anything_runs(sets, tmp_path):
    for asked in ({"evaluate": "score"}, {"evaluate": "generate"}):
        with pytest.raises(UserError) as raised:
            build(resolve(config=config(sets, tmp_path, tasks=["color", "size"], **asked)))
        (fault,) = raised.value.faults
        assert "S3FT lets the model write answers, but those of this stream are no free text" in fault
