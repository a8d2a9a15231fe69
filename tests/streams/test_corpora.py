"""Domains of whole texts: blocks, training, perplexities and what they are made of, and what is refused."""

import json
import math
import re

import numpy as np
import pytest
import torch

import clplat
from clplat.backbones.answering import read_ids
from clplat.config.resolve import resolve
from clplat.data.tokens import Bytes
from clplat.errors import MissingError, UserError
from clplat.metrics.record import ExperienceRecord, RunRecord
from clplat.metrics.summary import summarize
from clplat.run.build import build
from clplat.run.evaluation import Evaluator
from clplat.stream import Kind
from clplat.streams.corpora import Corpora

pytestmark = pytest.mark.usefixtures("own_cache")
SENTENCES = {"bees": "bees sum and bees hum. ", "cars": "CARS HONK, VANS TOOT! ", "wasps": "wasps sum and fly. "}


@pytest.fixture
def corpora(tmp_path):
    for name, sentence in SENTENCES.items():
        folder = tmp_path / "corpora" / name
        folder.mkdir(parents=True)
        (folder / "train.txt").write_text(sentence * 12)
        rows = [{"text": sentence * 2, "source": "made"}, {"text": sentence * (3 if name == "cars" else 1)}]
        (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return {"path": str(tmp_path / "corpora"), "max_length": 32}


def config(corpora, tmp_path, **more):
    return {
        "strategy": {"name": "naive", "optimizer": "adamw", "lr": 1e-2},
        "stream": {"name": "corpora", **corpora},
        "backbone": {"name": "language_model", "dim": 16, "depth": 1, "heads": 2, "vocabulary": 259},
        "loop": {"batch_size": 4, "max_epochs": 2, "checkpoint_seconds": None},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
        **more,
    }


def scores(strategy, stream, size=4):
    return Evaluator(stream, device=torch.device("cpu"), batch_size=size)(strategy)


def test_blocks_of_each_domain_hold_its_texts(corpora):
    stream = Corpora(**corpora)
    assert "the last 20 training tokens of bees are left out" in stream.notes[1]
    assert not any("bees" in note for note in Corpora(**corpora, train_blocks=2).notes)  # asked for
    assert [e.name for e in stream] == ["bees", "cars", "wasps"]
    assert [e.kind for e in stream] == [Kind.LEARN] * 3
    for e in stream:
        inputs, labels = e.train.all()
        whole = torch.cat([inputs[:, 0].long(), labels], 1)  # all blocks are full: a shorter last one is left out
        text = stream_text(whole)
        sentence = SENTENCES[e.name]
        assert text == (sentence * 12)[: len(sentence) * 12 // 32 * 32]
        inputs, labels = e.test.all()
        assert torch.equal(inputs[:, 2].long(), labels)
        assert (inputs[:, 1] < 0).all()
        ids = [i for row in inputs for i in (*row[0].tolist(), *row[2].tolist()) if i >= 0]
        rows = 3 if e.name == "cars" else 1
        parts = [[b + 3 for b in (sentence * n).encode()] for n in (2, rows)]
        assert ids == [*parts[0], Bytes.end, *parts[1]]
    few = Corpora(**corpora, train_blocks=2, test_blocks=1)
    assert [(len(e.train), len(e.test)) for e in few] == [(2, 1)] * 3


def stream_text(ids):
    return Bytes().decode([i for i in ids.flatten().tolist() if i >= 0])


def test_the_loss_is_that_of_each_token_given_those_before_it(corpora, tmp_path):
    stream, strategy = build(resolve(config=config(corpora, tmp_path)))
    inputs, labels = stream[1].train.all()
    ids = torch.cat([inputs[:, 0].long(), labels], 1)
    logits = strategy.model.backbone.net(input_ids=ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert strategy.model.losses(inputs, labels).mean().item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_uniform_model_has_the_vocabulary_as_perplexity(corpora, tmp_path):
    stream, strategy = build(resolve(config=config(corpora, tmp_path)))
    strategy.model.backbone.net.get_output_embeddings().weight.data.zero_()
    assert [1 / s for s in scores(strategy, stream)] == pytest.approx([259] * 3, rel=1e-5)


def test_scores_weigh_each_token_alike_whatever_the_batch(corpora, tmp_path):
    stream, strategy = build(resolve(config=config(corpora, tmp_path)))
    found = scores(strategy, stream, 1)
    assert found == pytest.approx(scores(strategy, stream, 2), rel=1e-5)
    assert found == pytest.approx(scores(strategy, stream, 100), rel=1e-5)
    for e, score in zip(stream, found, strict=True):
        inputs, labels = e.test.all()
        lengths = (labels >= 0).sum(1)
        assert len(set(lengths.tolist())) > 1  # a last block is shorter, so that a mean over blocks is another number
        with torch.no_grad():
            total = -(strategy.model.losses(inputs[:, :2, :1], labels) * lengths).sum().item()
        assert score == pytest.approx(math.exp(total / int(lengths.sum())), rel=1e-5)


def test_without_a_rate_nothing_changes_and_with_one_domains_are_learned(corpora, tmp_path):
    names = ("perplexity_forgetting", "perplexity_backward_transfer", "perplexity_forward_transfer")
    still = clplat.run(config(corpora, tmp_path), quiet=True, **{"strategy.lr": 1e-30})
    assert all(row == still.accuracy_matrix[0] for row in still.accuracy_matrix)
    assert [still.metrics[name] for name in names] == [0, 0, 0]
    m = still.metrics
    assert m["zero_shot_perplexity"] == m["continual_perplexity"] == m["last_perplexity"] > 100
    assert m["sample_accuracy"] is None
    result = clplat.run(config(corpora, tmp_path), quiet=True)
    matrix = result.accuracy_matrix
    assert all(0 < value < 1 for row in matrix for value in row)
    assert all(matrix[j + 1][j] > matrix[j][j] for j in range(3))
    assert result.metrics["last_perplexity"] == pytest.approx(np.mean([1 / v for v in matrix[3]]))
    assert "1 / perplexity" in result.summary["stream_notes"][0]
    assert all(v > 1 for v in result.summary["representation"]["effective_rank"])


def test_metrics_by_hand():
    facts = [ExperienceRecord(name, Kind.LEARN, 4, 4) for name in "abc"]
    p = [[8, 6, 10], [4, 5, 8], [5, 2, 5], [8, 4, 2]]
    record = RunRecord(facts, matrix=[[1 / v for v in row] for row in p], perplexity=True)
    m, _ = summarize(record)
    assert m["zero_shot_perplexity"] == pytest.approx(8)
    assert m["continual_perplexity"] == pytest.approx(8 / 3)
    assert m["last_perplexity"] == pytest.approx(14 / 3)
    assert m["perplexity_forgetting"] == pytest.approx(math.log(2))  # both domains have doubled
    assert m["perplexity_backward_transfer"] == pytest.approx((4 - 8 + 2 - 4) / 2)
    assert m["perplexity_forward_transfer"] == pytest.approx(((6 - 5 + 10 - 8) / 2 + 10 - 5) / 2)
    record.matrix = record.matrix[:2]
    m, why = summarize(record)
    assert m["last_perplexity"] == pytest.approx(4)
    assert why["perplexity_forgetting"] == "no second domain has finished"
    record.perplexity = False
    assert "no perplexities" in summarize(record)[1]["last_perplexity"]


def test_orders(corpora):
    given = Corpora(**corpora, domains=["wasps", "cars", "bees"])
    assert [e.name for e in given] == ["wasps", "cars", "bees"]
    for seed in range(4):
        for order in ("shuffled", "similar"):
            options = corpora | {"order": order, "seed": seed, "domains": ["cars", "bees", "wasps"]}
            names = [e.name for e in Corpora(**options)]
            assert sorted(names) == sorted(SENTENCES)
            if order == "similar":  # insects stand together
                assert names.index("cars") != 1
            assert names == [e.name for e in Corpora(**options)]
    assert len({Corpora(**corpora, order="similar", seed=s)[0].name for s in range(8)}) == 3


def test_a_held_out_domain_is_measured_and_not_learned(corpora, tmp_path, cut):
    made = config(corpora | {"general_texts": ["cars"], "validation": 0.25}, tmp_path)
    made["strategy"] = {"name": "er", "memory": 4, "replay_batch": 2}
    result = clplat.run(made, quiet=True)
    assert [e["name"] for e in result.summary["experiences"]] == ["bees", "wasps"]
    (values,) = result.summary["general"]["perplexity"].values()
    assert len(values) == 3
    resumed = clplat.resume(cut(made, 1), quiet=True)
    assert resumed.accuracy_matrix == result.accuracy_matrix
    assert resumed.summary["general"] == result.summary["general"]
    held = clplat.run(made, quiet=True, **{"loop.evaluate_on": "valid"})
    assert held.metrics["last_perplexity"] > 1
    assert held.accuracy_matrix != result.accuracy_matrix


def test_held_out_blocks_are_not_trained_on(corpora):
    stream = Corpora(**corpora, validation=0.25)
    for e in stream:
        assert len(e.valid) == round(0.25 * (len(e.train) + len(e.valid)))
        assert not set(e.train.rows.tolist()) & set(e.valid.rows.tolist())
        assert e.valid.inputs.shape[1] == 3


def test_features_are_of_the_whole_block(corpora):
    inputs, labels = Corpora(**corpora)[0].test.all()
    ids = read_ids(inputs)
    assert torch.equal(ids[:, :1], inputs[:, 0, :1].long())
    assert torch.equal(ids[:, 1 : 1 + labels.shape[1]], labels)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_length": 31}, "stream.max_length: 31 is out of range (valid: ≥ 32)"),
        ({"train_blocks": 0}, "stream.train_blocks: 0 is out of range (valid: ≥ 1, or null)"),
        ({"validation": 1.0}, "stream.validation: 1.0 is out of range (valid: in [0, 1))"),
        ({"order": "random"}, "stream.order: 'random' is out of range (valid: given, shuffled or similar)"),
        ({"domains": []}, "stream.domains: [] is out of range (valid: names, or null)"),
        ({"domains": ["ants"]}, "stream.domains: 'ants' is unknown (valid: bees, cars, wasps)"),
        ({"domains": ["bees", "bees"]}, "stream.domains: bees stands there twice (valid: each once)"),
        ({"domains": ["bees"], "general_texts": ["bees"]}, "stream.general_texts: bees is learned (valid: one that"),
        ({"general_texts": ["ants"]}, "stream.general_texts: 'ants' is unknown (valid: bees, cars, wasps)"),
        ({"general_texts": ["bees", "cars", "wasps"]}, "stream.general_texts: leaves no domain to learn"),
    ],
)
def test_what_has_no_meaning_is_refused(corpora, options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Corpora(**corpora | options)


def test_texts_that_are_not_there_are_missing(corpora, tmp_path):
    file = tmp_path / "corpora" / "cars" / "train.txt"
    file.write_text("x")
    with pytest.raises(MissingError, match="train text of cars has less than two tokens"):
        Corpora(**corpora)
    file.unlink()
    with pytest.raises(MissingError, match=r"train\.txt is missing: put it there, or train\.jsonl"):
        Corpora(**corpora)
    (file.parent / "train.jsonl").write_text('{"body": "x"}')
    with pytest.raises(MissingError, match=r"row 1 of train of .* has no text in its field text"):
        Corpora(**corpora)
    with pytest.raises(MissingError, match=r"stream\.path: none is missing"):
        Corpora(path="none")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"strategy": {"name": "derpp"}}, "needs classes, but the answers of this stream are free text"),
        ({"strategy": {"name": "hnet"}}, "stream: needs backbone language_model as it is, but HNet"),
        ({"backbone": {"name": "language_model", "family": "t5"}}, "stream: an encoder-decoder has no perplexity"),
        ({"backbone": {"name": "text_encoder"}}, "stream: needs backbone language_model as it is"),
    ],
)
def test_models_and_strategies_that_do_not_fit_are_refused(corpora, tmp_path, changed, message):
    with pytest.raises(UserError, match=re.escape(message)):
        build(resolve(config=config(corpora, tmp_path, **changed)))


def test_blocks_beyond_the_context_are_refused(corpora, tmp_path, monkeypatch):
    monkeypatch.setattr("clplat.backbones.language_model.LanguageModel.context", 31)
    with pytest.raises(UserError, match="stream: bees has texts of 32 tokens, but the model's context is 31") as caught:
        build(resolve(config=config(corpora, tmp_path)))
    assert len(caught.value.faults) == 3


def test_requests_to_forget_are_refused(corpora, tmp_path):
    made = config(corpora, tmp_path, strategy={"name": "gradient_ascent"})
    made["stream"] = {"name": "unlearning", "base": "corpora", "base_options": corpora}
    with pytest.raises(UserError, match=r"stream\.base: is scored by perplexity"):
        build(resolve(config=made))
