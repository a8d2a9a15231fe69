"""Texts that are adapted to: what comes, what is refused, and methods of normalisation layers on encoders."""

import pytest
import torch
from reading import read
from texts import write

import clplat
from clplat import Kind
from clplat.errors import MissingError, UserError
from clplat.streams.text import Text

pytestmark = pytest.mark.usefixtures("own_cache")
WORDS = {"good": "fine nice great", "bad": "poor sad awful"}


@pytest.fixture
def reviews(sets):
    """Two shops with the same two answers; the second shop's reviews are longer, and its test rows sorted by answer."""
    for shop, more in (("books", ""), ("films", " I sat through all of it")):
        rows = [
            {"text": f"{word}{more} {i}", "label": answer}
            for answer, words in WORDS.items() for word in words.split() for i in range(8)
        ]  # fmt: skip
        write(sets / shop, "train", rows)
        write(sets / shop, "test", [{**row, "text": row["text"] + "!"} for row in rows])
    return {"benchmark": "jsonl", "path": str(sets), "tasks": ["books", "films"]}


def test_test_samples_of_a_task_come_in_drawn_order_and_are_not_learned(reviews):
    stream = Text(**reviews, adapt=["films"], seed=1)
    learned, adapted = stream
    assert [(e.kind, e.name, e.classes) for e in stream] == [
        (Kind.LEARN, "books", (0, 1)),
        (Kind.ADAPT, "films", (0, 1)),
    ]
    assert len(learned.train.inputs) == len(learned.train) == 48  # no training sample of films is anywhere
    assert adapted.test is None
    assert adapted.valid is None
    assert adapted.seen().train.labels is None
    prompts = [read(stream, adapted.train, i) for i in range(48)]
    assert sorted(prompts) == sorted(
        (f"{word} I sat through all of it {i}!", answer, [])
        for answer, words in WORDS.items() for word in words.split() for i in range(8)
    )  # fmt: skip
    assert len({label for _, label, _ in prompts[:12]}) == 2  # the file has them answer after answer
    again, other = (Text(**reviews, adapt=["films"], seed=s)[1].train.rows.tolist() for s in (1, 2))
    assert adapted.train.rows.tolist() == again != other
    few = Text(**reviews, adapt=["films"], test_per_class=4, train_per_class=2)
    assert [len(e.train) for e in few] == [4, 8]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapt": ["film"]}, r"stream\.adapt: 'film' is no task here \(valid: books, films\)"),
        ({"adapt": []}, r"stream\.adapt: \[\] is out of range \(valid: names of tasks, or null\)"),
        ({"adapt": ["books"]}, r"stream\.adapt: 'bad' as an answer of books is learned by no task before"),
        ({"tasks": ["books", "color"], "adapt": ["color"]}, r"stream\.adapt: 'blue' as an answer of color"),
        ({"adapt": ["films"], "blurry": 0.1}, r"stream\.adapt: \['films'\] has no meaning here \(valid: null; used"),
        ({"adapt": ["films"], "repetition": 0.1}, r"stream\.adapt: \['films'\] has no meaning here"),
        ({"adapt": ["films"], "tell_task": True}, r"stream\.tell_task: True does not go with stream\.adapt"),
        ({"adapt": ["films"], "candidates": "prompt"}, r"stream\.candidates: 'prompt' does not go with stream\.adapt"),
        ({"adapt": ["films"], "evaluate": "generate"}, r"stream\.evaluate: 'generate' does not go with stream\.adapt"),
    ],
)  # fmt: skip
def test_refuses(reviews, options, message):
    with pytest.raises(UserError, match=message):
        Text(**{**reviews, **options})


def test_a_task_without_test_samples_has_nothing_to_adapt_to(reviews, sets):
    write(sets / "empty", "train", [{"text": f"{i}", "label": ("good", "bad")[i % 2]} for i in range(8)])
    (sets / "empty" / "test.jsonl").write_text("\n")
    with pytest.raises(MissingError, match="empty"):
        Text(**{**reviews, "tasks": ["books", "empty"]}, adapt=["empty"])


def _run(reviews, tmp_path, strategy, backbone=None, **more):
    config = {
        "strategy": {"name": strategy, "optimizer": "adamw", "lr": 3e-3},
        "stream": {"name": "text", **reviews, "adapt": ["films"], "max_length": 40},
        "backbone": backbone or {"name": "text_encoder", "dim": 16, "depth": 1, "heads": 2},
        "loop": {"batch_size": 8, "max_epochs": 8, "checkpoint_seconds": None},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
    }
    return clplat.run(config, quiet=True, **more)


def _weights(result):
    return {k: v for k, v in clplat.load(result.run_dir).state_dict().items() if k.startswith("model.")}


@pytest.mark.parametrize(
    "strategy", ["tent", *(pytest.param(s, marks=pytest.mark.slow) for s in ("eata", "sar", "lame"))]
)
def test_entropy_methods_adapt_an_encoder_to_texts(strategy, reviews, tmp_path):
    source = _run(reviews, tmp_path, "source")
    sure = {"strategy.margin": 2.0} if strategy in ("eata", "sar") else {}  # enough of so small a model's predictions
    result = _run(reviews, tmp_path, strategy, **sure)
    segment = result.summary["adaptation"]["segments"][0]
    assert (segment["domain"], segment["samples"]) == ("films", 48)
    assert result.summary["metrics"]["source_accuracy"] == result.accuracy_matrix[2][0]
    before, after = _weights(source), _weights(result)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert all("LayerNorm" in name for name in moved)
    assert bool(moved) == (strategy != "lame")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_layers_that_divide_by_the_root_mean_square_adapt_too(family, reviews, tmp_path):
    backbone = {"name": "language_model", "family": family, "dim": 16, "depth": 1, "heads": 2}
    source = _run(reviews, tmp_path, "source", backbone, **{"loop.max_epochs": 1})
    result = _run(reviews, tmp_path, "tent", backbone, **{"loop.max_epochs": 1})
    before, after = _weights(source), _weights(result)
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert moved
    assert all("norm" in name for name in moved)
    assert len(moved) == sum("norm" in name for name in before)


def test_what_changes_images_is_refused_before_it_runs(reviews, tmp_path):
    with pytest.raises(UserError, match=r"RoTTA adapts by changed images, which texts have not"):
        _run(reviews, tmp_path, "rotta")
