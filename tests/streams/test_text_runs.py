"""Whole runs of language models over text streams."""

from pathlib import Path

import pytest
import torch
from texts import ROOT, needs_data, write

import clplat
from clplat.backbones.language_model import language_model
from clplat.config.resolve import resolve
from clplat.errors import UserError
from clplat.run.build import build
from clplat.stream import Data
from clplat.streams.text import Text

pytestmark = pytest.mark.usefixtures("own_cache")


def _config(sets: Path, tmp_path: Path, **more):
    return {
        "strategy": {"name": "naive", "optimizer": "adamw", "lr": 3e-3},
        "stream": {"name": "text", "benchmark": "jsonl", "path": str(sets), "tasks": ["color", "size"]},
        "backbone": {"name": "language_model", "dim": 16, "depth": 1, "heads": 2},
        "loop": {"batch_size": 4, "max_epochs": 2, "checkpoint_seconds": None},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
        **more,
    }


@pytest.mark.parametrize("strategy", ["naive", "er", "ewc", "joint", "lwf", "si", "derpp"])
def test_strategies_run_on_text(strategy, sets, tmp_path):
    config = _config(sets, tmp_path)
    config["strategy"]["name"] = strategy
    result = clplat.run(config, quiet=True)
    assert result.summary["status"] == "complete"
    assert all(0 <= value <= 1 for row in result.accuracy_matrix for value in row)


def test_a_model_learns_its_answers(sets, tmp_path):
    config = _config(sets, tmp_path, loop={"batch_size": 4, "max_epochs": 25, "checkpoint_seconds": None})
    config["stream"]["tasks"] = ["color"]
    # Test prompts are training prompts here, so a model that has learned answers them.
    matrix = clplat.run(config, quiet=True, **{"strategy.lr": 1e-2}).accuracy_matrix
    assert matrix[1][0] == 1.0
    learner = clplat.load(next((tmp_path / "runs").glob("*/*")))
    stream, _ = build(resolve(config=config))
    raw, labels = stream[0].test.all()
    assert torch.equal(learner.predict(raw).argmax(1), labels)


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_free_text_is_learned_replayed_and_generated(family, sets, tmp_path):
    config = _config(sets, tmp_path)
    config["strategy"] = {"name": "er", "optimizer": "adamw", "memory": 8, "replay_batch": 4}
    config["stream"] |= {"tasks": ["color", "free"], "evaluate": "generate", "max_answer": 8}
    config["backbone"]["family"] = family
    result = clplat.run(config, quiet=True)
    assert result.summary["status"] == "complete"
    assert len(result.accuracy_matrix) == 3


def test_batches_hold_prompts_of_similar_length(sets):
    stream = Text(benchmark="jsonl", path=str(sets), tasks=["free"], max_length=64, evaluate="generate")
    data, drawn = stream[0].train, torch.randperm(30, generator=torch.Generator().manual_seed(0))
    lengths = (data.inputs[data.row_ids(), 0] >= 0).sum(1)
    padded = [lengths[o].view(-1, 5).amax(1).sum() for o in (drawn, stream.arrange(data, drawn, 5))]
    assert padded[1] == lengths.sort().values.view(-1, 5).amax(1).sum() < padded[0]


def test_a_run_takes_the_batches_as_its_stream_arranges_them(sets, tmp_path, monkeypatch):
    taken, original = [], Data.batch
    monkeypatch.setattr(Text, "arrange", lambda self, data, order, batch_size: order.sort().values)
    monkeypatch.setattr(Data, "batch", lambda self, at: (taken.append(self.rows[at].tolist()), original(self, at))[1])
    config = _config(sets, tmp_path, loop={"batch_size": 4, "max_epochs": 1, "checkpoint_seconds": None})
    plain, options = config["stream"], {k: v for k, v in config["stream"].items() if k != "name"}
    for stream in (plain, {"name": "unlearning", "base": "text", "base_options": options, "count": 1}):
        taken.clear()
        clplat.run(config | {"stream": stream, "strategy": "finetune_retained"}, quiet=True)
        assert [4, 5, 6, 7] in taken


@pytest.mark.parametrize("stop", [1, 4])
def test_a_resumed_run_is_the_run(stop, sets, tmp_path, cut):
    config = _config(sets, tmp_path)
    config["strategy"] = {"name": "er", "optimizer": "adamw", "memory": 6, "replay_batch": 3}
    config["backbone"]["family"] = "t5"  # its dropout draws, too
    straight = clplat.run(config, quiet=True)
    folder = cut(config, stop)
    resumed = clplat.resume(folder, quiet=True)
    assert resumed.accuracy_matrix == straight.accuracy_matrix
    one, two = (clplat.load(r.run_dir).state_dict() for r in (straight, resumed))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_language_model_is_asked_to_forget_an_answer(sets, tmp_path):
    config = _config(sets, tmp_path, strategy="finetune_retained")
    config["stream"] = {"name": "unlearning", "base": "text", "base_options": config["stream"], "count": 1}
    del config["stream"]["base_options"]["name"]
    assert [len(row) for row in clplat.run(config, quiet=True).accuracy_matrix] == [3] * 4


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_two_processes_equal_one_with_the_doubled_batch(family, sets, tmp_path):
    config = _config(sets, tmp_path, loop={"batch_size": 8, "max_epochs": 2, "checkpoint_seconds": None})
    config["strategy"] = {"name": "er", "memory": 6, "replay_batch": 4, "lr": 0.1}
    config["stream"] |= {"tasks": ["color", "free"], "evaluate": "generate", "max_answer": 8}
    config["backbone"]["family"] = family
    if family == "t5":  # its dropout is drawn by each process for itself
        folder = tmp_path / "plain"
        backbone = language_model((2, 9), family="t5", dim=16, depth=1, heads=2, vocabulary=259)
        backbone.net.config.dropout_rate = 0.0
        backbone.net.config.feed_forward_proj = "gated-gelu"  # a ReLU may fall on the other side by one rounding
        backbone.net.config.save_pretrained(folder)
        config["backbone"] = {"name": "language_model", "config": str(folder)}
        config["stream"]["tokenizer"] = "bytes"
    one = clplat.run(config, quiet=True)
    halved = {"loop.batch_size": 4, "strategy.replay_batch": 2, "fabric.devices": 2}
    two = clplat.run({**config, "output": str(tmp_path / "two")}, quiet=True, **halved)
    expected, found = (clplat.load(r.run_dir).state_dict() for r in (one, two))
    for name, value in expected.items():
        if isinstance(value, torch.Tensor) and value.is_floating_point():
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0)
    assert two.accuracy_matrix == one.accuracy_matrix


def test_a_head_is_refused_and_the_tokenizer_must_fit(sets, tmp_path):
    with pytest.raises(UserError, match=r"head: 'cosine' has no meaning here \(backbone language_model"):
        build(resolve(config=_config(sets, tmp_path, head="cosine")))
    config = _config(sets, tmp_path)
    config["backbone"]["vocabulary"] = 100
    with pytest.raises(UserError, match=r"stream\.tokenizer: gives 259 ids, but the model knows 100"):
        build(resolve(config=config))
    with pytest.raises(UserError, match=r"backbone: language_model takes text"):
        build(resolve(strategy="naive", backbone="language_model"))
    with pytest.raises(UserError, match=r"backbone: mlp takes no token ids \(valid: text_encoder, language_model\)"):
        build(resolve(config=_config(sets, tmp_path, backbone="mlp")))


def _encoder(sets, tmp_path, strategy, **stream):
    config = _config(sets, tmp_path, backbone={"name": "text_encoder", "dim": 16, "depth": 1, "heads": 2})
    config["strategy"] = strategy
    config["stream"] |= {"classes_per_task": 1, **stream}
    return config


@pytest.mark.parametrize("head", ["linear", "growing", "masked", "cosine", "ncm"])
def test_labelled_texts_are_learned_class_by_class_with_any_head(head, sets, tmp_path):
    result = clplat.run(_encoder(sets, tmp_path, "er", tasks=["color"]), head=head, quiet=True)
    assert result.summary["status"] == "complete"
    learner = clplat.load(result.run_dir)
    stream, _ = build(resolve(config=result.run_dir / "config.yaml"))
    assert not len(stream.answers.classes)
    assert learner.predict(stream[0].test.all()[0]).shape[1] == 2


def test_a_told_task_has_its_own_rows_and_predictions_among_its_classes(sets, tmp_path):
    config = _encoder(sets, tmp_path, "lwf", tasks=["color"], tell_task=True)
    matrix = clplat.run(config, head="taskwise", quiet=True).accuracy_matrix
    assert [row[i] for i, row in enumerate(matrix[1:])] == [1.0, 1.0]  # a task of one class
    both = _encoder(sets, tmp_path, "er", tasks=["size", "color"], classes_per_task=None, tell_task=True)
    with pytest.raises(UserError, match=r"replays by its class, but class 1 is in tasks 0, 1"):
        clplat.run(both, head="taskwise", quiet=True)


def test_the_same_answers_in_two_tasks_are_domains(sets, tmp_path):
    write(sets / "paint", "train", [{"prompt": f"paint {i}", "answer": ("blue", "red")[i % 2]} for i in range(6)])
    write(sets / "paint", "test", [{"prompt": "paint 1", "answer": "red"}])
    stream, _ = build(resolve(config=_encoder(sets, tmp_path, "naive", tasks=["color", "paint"], classes_per_task=2)))
    assert [e.classes for e in stream] == [(0, 1), (0, 1)]


def test_a_request_to_forget_speaks_the_language_of_the_backbone(sets, tmp_path):
    config = _encoder(sets, tmp_path, "finetune_retained", tasks=["color", "size"])
    options = {k: v for k, v in config["stream"].items() if k != "name"}
    config["stream"] = {"name": "unlearning", "base": "text", "base_options": options, "count": 1}
    stream, strategy = build(resolve(config=config))
    assert strategy.model.head.num_classes == stream.num_classes == 4
    assert not len(stream.answers.classes)
    assert clplat.run(config, quiet=True).summary["status"] == "complete"


def test_words_and_classes_go_to_the_backbones_that_take_them(sets, tmp_path):
    config = _encoder(sets, tmp_path, "naive", tasks=["color"])
    assert len(build(resolve(config=_config(sets, tmp_path)))[0].answers.classes)
    for options, fault in (
        (
            {"stream.answer": "class", "backbone": "language_model"},
            r"stream\.answer: class, but language_model answers",
        ),
        ({"stream.evaluate": "generate"}, r"stream\.evaluate: 'generate' has no meaning with stream\.answer class"),
        ({"stream": "digits"}, r"backbone: text_encoder takes text"),
    ):
        with pytest.raises(UserError, match=fault):
            build(resolve(config=config if "stream" not in options else {**config, "stream": "digits"},
                          **{k: v for k, v in options.items() if k != "stream"}))  # fmt: skip


@needs_data
def test_the_small_llama_on_the_data_root(tmp_path, monkeypatch):
    monkeypatch.setenv("CLPLAT_DATA", ROOT)
    config = _config(Path(), tmp_path, backbone={"name": "language_model", "weights": "stories260k"})
    config["stream"] = {"name": "text", "tasks": ["cb", "copa"], "train_per_class": 4, "test_per_class": 4}
    config["stream"]["max_length"] = 200
    stream, _ = build(resolve(config=config))
    assert stream.tokenizer.size == 512  # the model's own
    assert clplat.run(config, quiet=True).summary["status"] == "complete"
    config["stream"]["max_length"] = 512
    config["stream"]["tasks"] = ["boolqa"]
    with pytest.raises(UserError, match=r"stream\.max_length: prompts of 512 tokens .* context of 512"):
        build(resolve(config=config))
