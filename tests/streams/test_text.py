"""Text streams: what a sample says, and who is scored how."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from reading import read
from texts import LABELS, ROOT, needs_data, write

from clplat.data.prompts import KEPT_AT_END
from clplat.errors import MissingError, UserError
from clplat.streams import _text_tasks
from clplat.streams.text import Text

pytestmark = pytest.mark.usefixtures("own_cache")


def test_prompts_classes_and_labels(sets):
    stream = Text(benchmark="jsonl", path=str(sets), tasks=["color", "size"])
    assert [e.name for e in stream] == ["color", "size"]
    assert stream.class_names == ("blue", "red", "big", "small")  # red is one class in both tasks
    assert [e.classes for e in stream] == [(0, 1), (1, 2, 3)]
    assert stream.input_shape == (2, stream[0].train.inputs.shape[2])
    for e in stream:
        for part in (e.train, e.test):
            for i in range(len(part)):
                prompt, label, named = read(stream, part, i)
                number = int(prompt.split()[1].rstrip("?"))
                assert prompt.startswith(e.name)
                assert label == LABELS[e.name][number % len(LABELS[e.name])]
                assert named == []
    answers = [[i for i in row if i >= 0] for row in stream.answers.classes.tolist()]
    assert [stream.tokenizer.decode(row) for row in answers] == list(stream.class_names)
    assert all(row[-1] == stream.tokenizer.end for row in answers)
    assert (stream[0].train.inputs[0, 0, 0],) == stream.tokenizer.before
    named = Text(benchmark="jsonl", path=str(sets), tasks=["size", "color"], candidates="prompt")
    assert [read(named, e.test, 0)[2] for e in named] == [["big", "red", "small"], ["blue", "red"]]


def test_no_answer_stands_in_the_inputs_and_no_task_shares_rows(sets):
    stream = Text(benchmark="jsonl", path=str(sets), tasks=["color", "size"])
    assert stream[0].train.inputs is stream[1].train.inputs
    assert stream[0].test.inputs is not stream[0].train.inputs  # no row number of training data reaches a test sample
    rows = torch.cat([e.train.rows for e in stream])
    assert len(rows.unique()) == len(rows) == len(stream[0].train.inputs)
    for table in (stream[0].train.inputs, stream[0].test.inputs):
        for row in table[:, 0].tolist():
            text = stream.tokenizer.decode([i for i in row if i >= 0])
            assert not any(label in text for label in ("blue", "red", "big", "small"))


def test_long_prompts_lose_their_middle(sets):
    write(
        sets / "long",
        "train",
        [{"prompt": "x" * 70 + f"{i} the very end: ANSWER", "answer": "ab"[i % 2]} for i in range(8)],
    )
    write(sets / "long", "test", [{"prompt": "short", "answer": "a"}])
    stream = Text(benchmark="jsonl", path=str(sets), tasks=["long"], max_length=40)
    assert stream.input_shape == (2, 40)
    prompt, _, _ = read(stream, stream[0].train, 0)
    assert stream.notes == (
        "stream.max_length: 8 of 8 train prompts of long lose tokens before their end (93 at most, of which 40 stay)",
    )
    assert prompt.endswith("very end: ANSWER"[-KEPT_AT_END:])
    assert prompt.startswith("xxx")
    assert len(prompt) == 39  # and the token that begins it
    assert read(stream, stream[0].test, 0)[0] == "short"


def test_samples_are_drawn_by_seed_and_test_samples_alike(sets):
    def rows(seed, **options):
        stream = Text(benchmark="jsonl", path=str(sets), tasks=["color", "size"], seed=seed, **options)
        return [[read(stream, part, i)[:2] for i in range(len(part))] for e in stream for part in (e.train, e.test)]

    few = rows(1, train_per_class=2, test_per_class=1)
    assert [len(r) for r in few] == [4, 2, 6, 3]
    assert all(sorted({label for _, label in r}) == sorted(LABELS[r[0][0].split()[0]]) for r in few)
    other = rows(2, train_per_class=2, test_per_class=1)
    assert few[0] != other[0]
    assert few[1] == other[1]
    assert few == rows(1, train_per_class=2, test_per_class=1)
    stream = Text(benchmark="jsonl", path=str(sets), tasks=["color", "size"], validation=0.34)
    for e in stream:
        held, kept = set(e.valid.rows.tolist()), set(e.train.rows.tolist())
        assert held
        assert not held & kept
        assert e.valid.targets().unique().tolist() == e.train.targets().unique().tolist()


def test_free_answers_are_token_ids_and_scored_by_the_best_reference(sets):
    with pytest.raises(UserError, match=r"stream\.evaluate: score needs answers .* of free are free text"):
        Text(benchmark="jsonl", path=str(sets), tasks=["free"])
    stream = Text(benchmark="jsonl", path=str(sets), evaluate="generate", max_answer=12)
    assert stream.num_classes == 0
    assert stream.answers.new_tokens == 12
    labels = stream[1].test.targets()  # the tasks are in order of name: color, free, size
    assert labels.shape[0] == 4
    assert stream[1].name == "free"

    def score(texts, labels):
        ids = [stream.tokenizer.encode([t])[0] for t in texts]
        width = max(map(len, ids))
        table = torch.tensor([row + [-1] * (width - len(row)) for row in ids])
        return stream.score(table, labels[: len(texts)])

    assert stream.tokenizer.decode([i for i in labels[2].tolist() if i >= 0]) == "t2"
    assert score(["t0", "it is 1", "it was 2", "no"], labels).tolist() == pytest.approx([1, 1, 2 / 3, 0])
    assert score([" RED."], stream[0].test.targets()[1:]).tolist() == [1]


def test_generated_choices_are_scored_by_exact_match(sets):
    stream = Text(benchmark="jsonl", path=str(sets), tasks=["color"], evaluate="generate")
    ids = torch.tensor([stream.tokenizer.encode([t])[0] for t in ("Red.", "blue")])
    assert stream.score(ids, torch.tensor([1, 1])).tolist() == [1, 0]
    logits = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    assert stream.score(logits, torch.tensor([1, 1])).tolist() == [1, 0]


def test_which_tasks_are_choices(sets):
    assert Text(benchmark="jsonl", path=str(sets), tasks=["size"], choices=3).num_classes == 3
    with pytest.raises(UserError, match="those of size are free text"):
        Text(benchmark="jsonl", path=str(sets), tasks=["size"], choices=2)


def test_a_file_holds_every_fifth_row_out(tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text("\n".join(json.dumps({"question": f"q{i}", "label": i % 2}) for i in range(20)))
    stream = Text(benchmark="jsonl", path="mine.jsonl", data_root=str(tmp_path))
    assert (stream[0].name, len(stream[0].train), len(stream[0].test)) == ("mine", 16, 4)
    assert stream.class_names == ("0", "1")
    assert [read(stream, stream[0].test, i)[0] for i in range(4)] == ["q4", "q9", "q14", "q19"]


def test_trace(tmp_path):
    trace = tmp_path / "trace"
    for name in [*_text_tasks.TRACE, "MedMCQA"]:
        letters = name in ("C-STANCE", "FOMC", "ScienceQA", "MedMCQA")
        rows = [{"prompt": f"{name} {i}", "answer": "ABC"[i % 3] if letters else f"{name} says {i}"} for i in range(30)]
        (trace / name).mkdir(parents=True)
        for part in ("train", "test"):
            (trace / name / f"{part}.json").write_text(json.dumps(rows))
    stream = Text(benchmark="trace", path=str(trace), evaluate="generate", train_per_class=5, max_length=64)
    assert [e.name for e in stream] == list(_text_tasks.TRACE)
    assert len(stream) == 8
    right = {e.name: stream._right(e.test.targets()[0].tolist())[0] for e in stream}
    assert right["C-STANCE"] == ("choice", "A")
    assert right["MeetingBank"] == ("rouge_l", "MeetingBank says 0")
    assert right["Py150"][0] == "similarity"
    more = Text(benchmark="trace", path=str(trace), tasks=["MedMCQA", "20Minuten"], evaluate="generate", max_length=64)
    assert more._right(more[0].test.targets()[0].tolist()) == [("choice", "A")]
    two = Text(benchmark="trace", path=str(trace), tasks=["FOMC", "C-STANCE"])
    assert [e.name for e in two] == ["FOMC", "C-STANCE"]
    assert two.class_names == ("A", "B", "C")


def _olora(root: Path, name: str, train: int, test: int, layout: str = "olora_text") -> None:
    group, dataset, labels = _text_tasks.OLORA[name]
    folder = root / layout / (name if layout == "olora_text" else f"{group}/{dataset}")
    folder.mkdir(parents=True)
    for part, count in (("train", train), ("test", test)):
        rows = [{"label": labels[i % len(labels)], "sentence": f"{name} {part} {i}"} for i in range(count)]
        if part == "test" and name == "mnli":
            rows.append({"label": "-", "sentence": "no gold label"})
        if count and layout == "olora_text":
            (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, rows)).encode()))
        elif count:
            (folder / f"{part}.json").write_text(json.dumps(rows))


def test_the_benchmark_with_its_template(tmp_path):
    for name, sizes in {
        "dbpedia": (0, 70),
        "amazon": (20, 10),
        "yahoo": (20, 10),
        "agnews": (20, 0),
        "mnli": (9, 9),
    }.items():
        _olora(tmp_path, name, *sizes, layout="CL_Benchmark" if name == "yahoo" else "olora_text")
    _olora(tmp_path, "copa", 8, 4)
    stream = Text(order=1, data_root=str(tmp_path))
    assert [e.name for e in stream] == ["dbpedia", "amazon", "yahoo", "agnews"]
    assert stream.num_classes == 14 + 5 + 10 + 4 - 1  # Sports is in yahoo and in agnews
    assert [(len(e.train), len(e.test)) for e in stream] == [(56, 14), (20, 10), (20, 10), (16, 4)]
    assert read(stream, stream[3].test, 0)[0].endswith("agnews train 16\nAnswer:")  # the last fifth
    asked = (
        "What is this text about? Choose one of the options.\nOption: World, Sports, Business, Science or Technology"
    )
    prompt = read(stream, stream[3].train, 1)[0]
    assert prompt == f"Task:TC\nDataset:agnews\n{asked} \nagnews train 1\nAnswer:"
    bare = Text(tasks=["agnews"], data_root=str(tmp_path), preamble=False)
    assert read(bare, bare[0].train, 1)[0] == "agnews train 1\nAnswer:"
    others = Text(tasks=["copa", "mnli"], data_root=str(tmp_path))
    assert read(others, others[0].test, 1)[0] == "Task:COPA\nDataset:COPA\ncopa test 1\nAnswer:"
    assert len(others[1].test) == 9  # without the row that has no gold label
    assert others.notes == ("stream.tasks: 1 of 10 test rows of mnli have no gold label: left out",)
    lines = {g: [{"instruction_type": "few-shot", "instruction": "no"}, {"instruction_type": "zero-shot",
             "instruction": f"Published {g}.\n"}] for g in _text_tasks._ASKED}  # fmt: skip
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    published = Text(tasks=["agnews"], data_root=str(tmp_path), instructions="lines.json")
    assert read(published, published[0].train, 1)[0] == prompt.replace(asked.partition("\n")[0], "Published TC.")
    del lines["SC"]
    (tmp_path / "lines.json").write_text(json.dumps(lines))
    with pytest.raises(UserError, match=r"stream\.instructions: .* lacks SC"):
        Text(tasks=["agnews"], data_root=str(tmp_path), instructions="lines.json")


def test_classes_alone_have_neither_preamble_nor_cue_and_lose_their_end(tmp_path):
    _olora(tmp_path, "agnews", 28, 28)
    options = {"tasks": ["agnews"], "data_root": str(tmp_path), "answer": "class"}
    stream = Text(**options)
    assert read(stream, stream[0].train, 1)[0] == "agnews train 1"
    assert stream.num_classes == 4
    assert stream.answers.classes.shape == (0, 0)
    begun = Text(**options, preamble=True)
    assert read(begun, begun[0].train, 1)[0].endswith("agnews train 1")
    assert read(begun, begun[0].train, 1)[0].startswith("Task:TC")
    long = Text(**options, preamble=True, max_length=32)
    assert read(long, long[0].train, 1)[0] == read(begun, begun[0].train, 1)[0][:31]  # and the token that begins it
    assert "28 of 28 train prompts of agnews lose their end (" in long.notes[0]


def test_equal_token_ids_matter_to_words_alone(sets, monkeypatch):
    """A tokenizer that knows no case gives two classes the same ids; an id of a class is none the worse for it."""
    rows = [{"prompt": f"{i}", "answer": ("a", "A")[i % 2]} for i in range(8)]
    write(sets / "case", "train", rows)
    write(sets / "case", "test", rows)
    monkeypatch.setattr("clplat.data.tokens.Bytes.encode", lambda self, texts: [[*t.lower().encode()] for t in texts])
    options = {"benchmark": "jsonl", "path": str(sets), "tasks": ["case"]}
    with pytest.raises(UserError, match="have the same token ids"):
        Text(**options)
    assert Text(**options, answer="class").num_classes == 2


def test_classes_alone_need_classes(sets):
    with pytest.raises(UserError, match=r"stream\.answer: class, but those of free are free text"):
        Text(benchmark="jsonl", path=str(sets), tasks=["free"], answer="class")


def test_a_task_is_cut_into_parts_of_its_classes(tmp_path):
    for name in ("dbpedia", "agnews"):
        _olora(tmp_path, name, 28, 28)
    stream = Text(tasks=["dbpedia", "agnews"], classes_per_task=5, candidates="prompt", data_root=str(tmp_path))
    assert [e.name for e in stream] == ["dbpedia1", "dbpedia2", "dbpedia3", "agnews"]
    assert [e.classes for e in stream] == [(*range(5),), (*range(5, 10),), (*range(10, 14),), (*range(14, 18),)]
    assert [(len(e.train), len(e.test)) for e in stream] == [(10, 10), (10, 10), (8, 8), (28, 28)]
    assert read(stream, stream[2].test, 0)[1:] == ("Plant", ["Plant", "Album", "Film", "Written Work"])


def test_the_published_orders():
    assert {n: len(o) for n, o in _text_tasks.ORDERS.items()} == {1: 4, 2: 4, 3: 4, 4: 15, 5: 15, 6: 15}
    assert all(len(set(o)) == len(o) and set(o) <= set(_text_tasks.OLORA) for o in _text_tasks.ORDERS.values())
    assert (
        set(_text_tasks.ORDERS[4]) == set(_text_tasks.ORDERS[5]) == set(_text_tasks.ORDERS[6]) == set(_text_tasks.OLORA)
    )
    assert (_text_tasks.ORDERS[4][0], _text_tasks.ORDERS[5][0], _text_tasks.ORDERS[6][0]) == ("mnli", "multirc", "yelp")


def test_what_is_missing_is_named(tmp_path, sets):
    with pytest.raises(MissingError, match=r"data_root: not set, and so there is no olora_text"):
        Text()
    _olora(tmp_path, "agnews", 20, 10)
    with pytest.raises(MissingError) as caught:
        Text(data_root=str(tmp_path))
    assert len(caught.value.faults) == 3  # all at once
    assert all("--stream.absent skip" in f and "train.jsonl.gz" in f for f in caught.value.faults)
    some = Text(data_root=str(tmp_path), absent="skip")
    assert [e.name for e in some] == ["agnews"]
    assert "stream.tasks: yahoo is missing and left out" in some.notes
    with pytest.raises(MissingError, match="yahoo is missing"):
        Text(data_root=str(tmp_path), tasks=["yahoo"], absent="skip")  # nothing would be left
    with pytest.raises(MissingError, match=r"stream\.path: nowhere is missing"):
        Text(benchmark="trace", path="nowhere")
    with pytest.raises(MissingError, match=r"stream\.instructions: nowhere\.json is missing"):
        Text(instructions="nowhere.json", data_root=str(tmp_path))
    (sets / "size" / "test.jsonl").unlink()
    with pytest.raises(MissingError, match=r"size is missing: put .*test\.jsonl"):
        Text(benchmark="jsonl", path=str(sets), tasks=["size"])
    (sets / "color" / "train.jsonl").write_text('{"prompt": ')
    with pytest.raises(MissingError, match="replace it by a whole file"):
        Text(benchmark="jsonl", path=str(sets), tasks=["color"])
    with pytest.raises(MissingError, match="holds no task"):
        Text(benchmark="jsonl", path=str(tmp_path / "sets" / "color"))


def test_faults_are_told_in_one_line_each(sets):
    with pytest.raises(UserError) as caught:
        Text(order=7, max_length=5, max_answer=1, choices=0, validation=1.0, train_per_class=0, test_per_class=0,
             classes_per_task=0)  # fmt: skip
    assert len(caught.value.faults) == 8
    for options, message in (
        ({"tasks": ["colour"]}, r"stream\.tasks: 'colour' is unknown \(valid: color, free, size\)"),
        ({"path": None}, r"stream\.path: null \(valid for jsonl"),
        ({"benchmark": "olora"}, r"stream\.path: .* has no meaning here"),
    ):
        with pytest.raises(UserError, match=message):
            Text(**{"benchmark": "jsonl", "path": str(sets), "data_root": str(sets), **options})
    write(sets / "odd", "train", [{"what": 1}])
    write(sets / "odd", "test", [{"what": 1}])
    with pytest.raises(UserError, match=r"stream\.path: row 1 of odd train has what \(valid: one of prompt"):
        Text(benchmark="jsonl", path=str(sets), tasks=["odd"])


@needs_data
def test_the_data_root_holds_fourteen_of_the_fifteen_tasks(monkeypatch):
    monkeypatch.setenv("CLPLAT_DATA", ROOT)
    rows = _text_tasks.olora_task(Path(ROOT), "cb", _text_tasks.instruction_lines(None))
    assert (len(rows.train), len(rows.test)) == (250, 56)
    file = json.loads(Path(ROOT, "olora_text/tasks.json").read_text())["tasks"]
    for name, facts in file.items():
        assert tuple(facts["labels"]) == _text_tasks.OLORA[name][2]
    assert set(_text_tasks.OLORA) - set(file) == {"yahoo"}
    with pytest.raises(MissingError, match="yahoo is missing"):
        Text(order=3)


@pytest.mark.skipif(not ROOT or not Path(ROOT, "weights/smollm2_135m").is_dir(), reason="no smollm2_135m at hand")
def test_prompts_in_the_chat_template_are_the_models_own(sets):
    from transformers import AutoTokenizer

    folder = Path(ROOT, "weights/smollm2_135m")
    theirs, of_sets = (
        AutoTokenizer.from_pretrained(folder),
        {"benchmark": "jsonl", "path": str(sets), "tasks": ["size"]},
    )
    plain = Text(**of_sets, tokenizer=str(folder))
    stream = Text(**of_sets, tokenizer=str(folder), chat=True)
    for i in range(len(stream[0].train)):
        prompt = theirs.decode([i for i in plain[0].train.inputs[i, 0].tolist() if i >= 0])
        said = [{"role": "user", "content": prompt}]
        expected = theirs.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
        assert [i for i in stream[0].train.inputs[i, 0].tolist() if i >= 0] == expected
    (sets / "size" / "train.jsonl").write_text(
        "\n".join(json.dumps({"prompt": f"word {i} " * 99 + "the cue", "answer": "ab"[i % 2]}) for i in range(8))
    )
    write(sets / "size", "test", [{"prompt": "short", "answer": "a"}])
    cut = Text(**of_sets, tokenizer=str(folder), chat=True, max_length=60)
    text = theirs.decode(cut[0].train.inputs[0, 0].tolist())
    assert text.endswith("the cue<|im_end|>\n<|im_start|>assistant\n")
    assert cut.notes[0].startswith("stream.max_length: 8 of 8 train prompts of size")
