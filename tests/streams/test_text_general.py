"""Sets of text that no experience learns: what is asked, how it is scored, when, and what is refused."""

import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from texts import write

import clplat
from clplat.backbones.answering import Answerer
from clplat.backbones.language_model import language_model
from clplat.config.resolve import resolve
from clplat.data.tokens import Bytes
from clplat.errors import UserError
from clplat.run.build import build, build_stream
from clplat.run.evaluation import Evaluator
from clplat.strategies.naive import Naive
from clplat.streams._blocks import blocks
from clplat.streams.text import Text

pytestmark = pytest.mark.usefixtures("own_cache")
WORDS = "The sun is up. " * 5 + "It is warm."  # 86 bytes


@pytest.fixture
def options(sets) -> dict:
    """Color is learned; size is asked, and two texts are read."""
    (sets.parent / "sun.txt").write_text(WORDS)
    texts = {"general_texts": [str(sets.parent / "sun.txt"), "free"], "max_length": 40}
    return {"benchmark": "jsonl", "path": str(sets), "tasks": ["color"], "general": ["size"], **texts}


def config(options: dict, tmp_path: Path, **more) -> dict:
    return {
        "strategy": {"name": "naive", "optimizer": "adamw", "lr": 1e-2},
        "stream": {"name": "text", **options},
        "backbone": {"name": "language_model", "dim": 16, "depth": 1, "heads": 2, "vocabulary": 259},
        "loop": {"batch_size": 4, "max_epochs": 1, "checkpoint_seconds": None, "representation": False},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
        **more,
    }


def score(stream, what, strategy, size=4):
    return Evaluator(stream.general[what], device=torch.device("cpu"), batch_size=size)(strategy)


def small(stream) -> Naive:
    torch.manual_seed(0)
    net = language_model(stream.input_shape, dim=16, depth=1, heads=2, vocabulary=259)
    return Naive(model=net.assemble(None, stream.answers))


def test_blocks_hold_each_token_once_and_predict_all_but_the_first():
    first, others = blocks([np.arange(10, 15), np.arange(20, 24)], 2, 4)
    rows = torch.cat([first, others], 1).tolist()
    assert rows == [[10, 11, 12, 13], [14, 2, 20, 21], [22, 23, -1, -1]]
    assert len(blocks([np.arange(9)], 2, 4)[0]) == 2  # the ninth predicts nothing
    assert len(blocks([], 2, 4)[0]) == len(blocks([np.arange(1)], 2, 4)[0]) == 0


def test_a_uniform_model_has_the_vocabulary_as_perplexity(options):
    stream = Text(**options)
    strategy = small(stream)
    strategy.model.backbone.net.get_output_embeddings().weight.data.zero_()
    assert [1 / s for s in score(stream, "perplexity", strategy)] == pytest.approx([259, 259], rel=1e-5)


def test_perplexity_is_of_all_tokens_and_not_of_batches(options):
    stream = Text(**options)
    strategy = small(stream)
    ids = torch.tensor([b + 3 for b in WORDS.encode()])
    total, count = 0.0, 0
    for part in ids.split(40):  # 40, 40 and 6 tokens
        logits = strategy.model.backbone.net(input_ids=part[None]).logits[0].double().log_softmax(1)
        total -= logits[:-1].gather(1, part[1:, None]).sum().item()
        count += len(part) - 1
    assert count == 39 + 39 + 5
    found = [score(stream, "perplexity", strategy, size) for size in (1, 2, 100)]
    assert 1 / found[0][0] == pytest.approx(math.exp(total / count), rel=1e-5)
    assert found[0] == pytest.approx(found[1], rel=1e-5)
    assert found[0] == pytest.approx(found[2], rel=1e-5)


def test_texts_of_a_task_are_its_test_prompts_without_a_template(options):
    (_, _), (name, data) = [(e.name, e.test) for e in Text(**options).general["perplexity"]]
    assert name == "free"
    inputs, labels = data.all()
    ids = [i for row in inputs for i in (row[0].tolist() + row[2].tolist()) if i >= 0]
    documents = [[b + 3 for b in f"Name it.\nthing {i}".encode()] for i in range(4)]
    joined = [i for d in documents for i in (*d, Bytes.end)][:-1]
    assert ids == joined
    assert torch.equal(labels, inputs[:, 2].long())


def test_of_a_tasks_texts_so_many_of_each_class_are_read_and_of_a_file_all(options):
    def tokens(**more):
        return [int((e.test.all()[0][:, 2:] >= 0).sum()) for e in Text(**options | more).general["perplexity"]]

    (file, all_four), (same_file, two) = tokens(), tokens(test_per_class=2)
    assert same_file == file
    # The end token is between texts; the first token of each block of 40 is not predicted.
    assert (all_four, two) == (4 * 16 + 3 - 2, 2 * 16 + 1 - 1)


@pytest.mark.parametrize("candidates", ["all", "prompt"])
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_a_set_is_a_choice_among_its_own_answers(options, candidates, family):
    stream = Text(**options | {"candidates": candidates, "general_texts": None})
    assert stream.class_names == ("blue", "red")  # the set's answers are none that a strategy hears of
    net = language_model(stream.input_shape, dim=16, depth=1, heads=2, vocabulary=259, family=family)
    (e,) = stream.general["accuracy"]
    asked = Text(**options | {"tasks": ["size"], "general": None, "general_texts": None})  # the same as its own stream
    inputs, labels = e.test.all()
    model = Answerer(net, asked.answers).eval()
    with torch.no_grad():
        expected, found = (model.predict(x) for x in (asked[0].test.all()[0], inputs))
    assert asked.class_names == ("big", "red", "small")
    assert torch.allclose(found, expected, atol=1e-4)
    assert torch.equal(labels, asked[0].test.targets())
    assert found.std(1).min() > 0.1


def test_written_answers_are_scored_by_what_is_right(options):
    stream = Text(**options | {"general": ["free", "size"], "evaluate": "generate", "general_texts": None})
    free, size = stream.general["accuracy"]
    inputs, labels = free.test.all()
    assert inputs.shape[1] == 2

    def scored(texts, labels):
        ids = [stream.tokenizer.encode([t])[0] for t in texts]
        width = max(map(len, ids))
        table = torch.tensor([row + [-1] * (width - len(row)) for row in ids])
        return stream.general["accuracy"].score(table, labels).tolist()

    assert scored(["it is 0", "t1", "x", "t3"], labels) == [1, 1, 0, 1]
    answers = ["big", "red", "small"] * 2
    assert scored(answers, size.test.targets()) == [1.0] * 6
    assert scored(answers[::-1], size.test.targets()) == [0, 1, 0, 0, 1, 0]


def test_before_and_after_each_experience_and_a_resumed_run_goes_on(options, tmp_path, cut):
    made = config(options | {"tasks": ["color", "other"]}, tmp_path)
    write(Path(options["path"]) / "other", "train", [{"prompt": f"o {i}", "answer": "ab"[i % 2]} for i in range(12)])
    write(Path(options["path"]) / "other", "test", [{"prompt": "o 1", "answer": "b"}])
    result = clplat.run(made, quiet=True)
    facts = result.summary["general"]
    assert {what: list(sets) for what, sets in facts.items()} == {"accuracy": ["size"], "perplexity": ["sun", "free"]}
    (a,), (p, q) = facts["accuracy"].values(), facts["perplexity"].values()
    assert len(a) == len(p) == len(q) == 3
    assert len({*p}) == len({*q}) == 3
    assert min(p + q) > 100  # of 259 tokens
    metrics = result.metrics
    assert metrics["general_accuracy"] == a[2]
    assert metrics["general_drop"] == pytest.approx(a[0] - a[2])
    assert metrics["general_perplexity"] == pytest.approx(math.sqrt(p[2] * q[2]))
    assert metrics["general_perplexity_ratio"] == pytest.approx(math.sqrt(p[2] * q[2] / (p[0] * q[0])))
    logged = [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]
    after = {m["step"]: m["metrics"] for m in logged if m["axis"] == "experience"}
    assert [after[i]["perplexity/sun"] for i in (1, 2)] == p[1:]
    assert [after[i]["general/size"] for i in (1, 2)] == a[1:]
    assert "General ability" in (result.run_dir / "report.html").read_text()
    resumed = clplat.resume(cut(made, 2), quiet=True)
    assert resumed.summary["general"] == facts
    assert resumed.metrics["general_perplexity_ratio"] == metrics["general_perplexity_ratio"]


def test_measuring_changes_nothing_else(options, tmp_path):
    with_sets = clplat.run(config(options, tmp_path), quiet=True)
    without = clplat.run(config(options | {"general": None, "general_texts": None}, tmp_path), quiet=True)
    assert with_sets.accuracy_matrix == without.accuracy_matrix
    assert with_sets.summary["representation"] == without.summary["representation"]
    assert without.summary["general"] is None
    assert without.metrics["general_perplexity"] is None
    assert "not learned" in without.summary["why_null"]["general"]
    assert "not learned" in without.summary["why_null"]["general_drop"]


def test_i_lora_is_measured_by_its_slow_weights(options, tmp_path):
    made = config(options, tmp_path)
    made["strategy"] = {"name": "ilora", "rank": 2, "lr": 0.1, "memory": 4}
    result = clplat.run(made, quiet=True)
    strategy = clplat.load(result.run_dir).eval()
    inputs = Text(**options).general["perplexity"][0].test.all()[0]
    count = (inputs[:, 2] >= 0).sum()
    with torch.no_grad():
        fast = math.exp(-strategy.model.predict(inputs).sum() / count)
        with strategy.predicting():
            slow = math.exp(-strategy.model.predict(inputs).sum() / count)
    assert result.summary["general"]["perplexity"]["sun"][1] == pytest.approx(slow, rel=1e-5)
    assert abs(fast / slow - 1) > 1e-3


def test_test_data_are_withheld_where_validation_data_are_scored(options, tmp_path):
    made = resolve(config=config(options | {"validation": 0.5}, tmp_path, loop={"evaluate_on": "valid"}))
    assert build_stream(made).general == {}


def test_a_request_keeps_the_sets_of_its_base(options, tmp_path):
    made = config(options, tmp_path)
    made["stream"] = {"name": "unlearning", "base": "text", "base_options": options, "requests": ["experience:color"]}
    made["strategy"] = {"name": "gradient_ascent"}
    stream, _ = build(resolve(config=made))
    assert list(stream.general) == ["accuracy", "perplexity"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"general": ["sise"]}, "stream.general: 'sise' is unknown (valid: color, free, size)"),
        ({"general": []}, "stream.general: [] is out of range (valid: names of tasks, or null)"),
        ({"general": ["size", "size"]}, "stream.general: size stands there twice (valid: each task once)"),
        ({"general": ["color"]}, "stream.general: color is a task of the stream (valid: one that is not among"),
        ({"general_texts": ["color"]}, "stream.general_texts: color is a task of the stream"),
        ({"general_texts": ["free", "free"]}, "stream.general_texts: free stands there twice"),
        ({"general_texts": []}, "stream.general_texts: [] is out of range"),
        ({"general_texts": ["sunny"]}, "stream.general_texts: 'sunny' is unknown"),
        ({"general_texts": ["no.txt"]}, "stream.general_texts: no.txt is missing"),
        ({"general": ["free"]}, "stream.general: free has answers of free text, which can't be scored"),
        ({"answer": "class"}, "stream.general: has no meaning with stream.answer class (valid: null)"),
    ],
)
def test_what_can_not_be_measured_is_refused(options, changed, message):
    with pytest.raises(clplat.errors.ClplatError, match=re.escape(message)):
        Text(**options | changed)


def test_a_text_too_short_to_predict_is_refused(options, sets):
    (sets.parent / "one.txt").write_text("x")
    with pytest.raises(UserError, match=r"general_texts: .*one\.txt has less than two tokens"):
        Text(**options | {"general_texts": [str(sets.parent / "one.txt")]})


def test_all_tasks_but_those_of_the_sets_are_learned(options):
    names = [e.name for e in Text(**options | {"tasks": None, "general_texts": ["free"]})]
    assert names == ["color"]


def test_models_and_strategies_that_tell_no_likelihood_are_refused(options, tmp_path):
    made = config(options, tmp_path)
    made["backbone"] |= {"family": "t5"}
    with pytest.raises(UserError, match=r"stream\.general_texts: an encoder-decoder has no perplexity") as caught:
        build(resolve(config=made))
    assert len(caught.value.faults) == 1
    made = config(options, tmp_path, backbone={"name": "text_encoder", "dim": 16, "depth": 1, "heads": 2})
    with pytest.raises(UserError, match=r"stream\.general: has no meaning with stream\.answer class"):
        build(resolve(config=made))
    file = tmp_path / "own.py"
    file.write_text(
        "from clplat.strategies.naive import Naive\n"
        "class Own(Naive):\n"
        "    def predict(self, inputs, task=None):\n"
        "        return super().predict(inputs, task) * 2\n"
    )
    made = config(options, tmp_path, strategy={"name": f"{file}:Own"})
    with pytest.raises(UserError, match=r"stream\.general: Own predicts by more than its model") as caught:
        build(resolve(config=made))
    assert len(caught.value.faults) == 2


def test_a_record_without_sets_is_read(options):
    from clplat.metrics.record import ExperienceRecord, RunRecord
    from clplat.stream import Kind

    plain = RunRecord([ExperienceRecord("a", Kind.LEARN, 1, 1)], general=[{"accuracy": {"b": 0.5}}]).to_dict()
    assert RunRecord.from_dict(json.loads(json.dumps(plain))).general == [{"accuracy": {"b": 0.5}}]
    assert RunRecord.from_dict({k: v for k, v in plain.items() if k != "general"}).general == []


def test_a_continuation_without_a_token_is_never_the_best(options):
    model = small(Text(**options)).model.eval()
    inputs = torch.tensor([[[5, 6], [-1, -1], [7, -1], [-1, -1], [8, 9]]])
    with torch.no_grad():
        assert model.predict(inputs).isneginf().tolist() == [[False, True, False]]


def test_samples_of_a_set_are_drawn_and_move_with_the_stream(options):
    few, other = (Text(**options | {"test_per_class": 1, "seed": seed}).general["accuracy"][0].test for seed in (0, 1))
    assert sorted(few.targets().tolist()) == [0, 1, 2]
    assert torch.equal(few.inputs, other.inputs)
    moved = Text(**options).to(torch.device("meta"))
    assert {e.test.inputs.device.type for sets in moved.general.values() for e in sets} == {"meta"}
