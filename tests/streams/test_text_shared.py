"""Text streams whose tasks run into each other, or come back."""

from collections import Counter

import pytest
import torch
from reading import read
from texts import LABELS, write

import clplat
from clplat.errors import UserError
from clplat.streams.text import Text

pytestmark = pytest.mark.usefixtures("own_cache")


def _met(stream):
    """Of each experience, how often its training samples are of which (task, answer)."""
    samples = [[read(stream, e.train, i) for i in range(len(e.train))] for e in stream]
    return [Counter((prompt.split()[0], label) for prompt, label, _ in own) for own in samples]


@pytest.fixture
def three(sets):
    """Tasks of 40 training samples an answer, the answer red in two of them."""
    tasks = {**LABELS, "shape": ("round", "square")}
    for task, labels in tasks.items():
        rows = [{"prompt": f"{task} {i}?", "answer": labels[i % len(labels)]} for i in range(40 * len(labels))]
        write(sets / task, "train", rows)
        write(sets / task, "test", rows[:6])
    return {"benchmark": "jsonl", "path": str(sets), "tasks": list(tasks)}


def test_blurry_share_of_each_class_of_a_task_is_elsewhere_and_spread_evenly(three):
    stream = Text(**three, blurry=0.3, seed=2, candidates="prompt")
    assert [e.name for e in stream] == three["tasks"]
    for home, experience in enumerate(stream):
        for label in {**LABELS, "shape": ("round", "square")}[experience.name]:
            counts = [met[experience.name, label] for met in _met(stream)]
            assert counts[home] == 28
            assert [c for i, c in enumerate(counts) if i != home] == [6, 6]
        assert {read(stream, experience.test, i)[0].split()[0] for i in range(6)} == {experience.name}
        assert set(experience.classes) == set(range(6))  # red is one class in both of its tasks
    strangers = [i for i in range(len(stream[0].train)) if read(stream, stream[0].train, i)[0].startswith("shape")]
    assert read(stream, stream[0].train, strangers[0])[2] == ["round", "square"]  # a prompt names its own task's
    assert len(torch.cat([e.train.rows for e in stream]).unique()) == 40 * 7


def test_disjoint_classes_stay_whole_and_free_text_is_shared_out_by_task(three, sets):
    where = Counter(pool for met in _met(Text(**three, blurry=0.3, disjoint=0.5, seed=2)) for pool in met)
    assert sorted(where.values()) == [1, 1, 1, 1, 3, 3, 3]  # of seven (task, answer), round(3.5) to even
    free = Text(**{**three, "tasks": ["color", "free"]}, blurry=0.2, evaluate="generate", max_answer=8)
    assert [len(e.train) for e in free] == [64 + 6, 24 + 16]
    assert [e.classes for e in free] == [(), ()]


def test_repetition_brings_each_task_in_turn_and_shares_its_samples_out(three):
    stream = Text(**three, repetition=0.4, experiences=9, seed=4)
    met = _met(stream)
    assert [e.name for e in stream] == [f"repeat_{i}" for i in range(9)]
    for i, task in enumerate(three["tasks"]):
        first = [
            min(n for n, m in enumerate(met) if (task, label) in m)
            for label in {p[1] for m in met for p in m if p[0] == task}
        ]
        assert set(first) == {i}
    for pool in {p for m in met for p in m}:
        counts = [m[pool] for m in met if pool in m]
        assert sum(counts) == 40
        assert len(counts) > 1
        assert max(counts) - min(counts) <= 1
    for e, m in zip(stream, met, strict=True):
        assert e.title == ", ".join(t for t in three["tasks"] if any(p[0] == t for p in m))
        assert {read(stream, e.test, i)[:2] for i in range(len(e.test))} == {
            (f"{task} {i}?", labels[i % len(labels)])
            for task, labels in {**LABELS, "shape": ("round", "square")}.items()
            for i in range(6)
            if (task, labels[i % len(labels)]) in m
        }
        assert {stream.class_names[c] for c in e.classes} == {label for _, label in m}
    assert [len(e.train) for e in Text(**three, repetition=1.0)] == [28, 26 + 60, 26 + 60 + 80]


def test_validation_is_held_out_of_what_an_experience_gets(three):
    plain, held = (Text(**three, blurry=0.3, validation=v, seed=1) for v in (0.0, 0.25))
    for a, b in zip(plain, held, strict=True):
        assert sorted([*b.train.rows.tolist(), *b.valid.rows.tolist()]) == a.train.rows.tolist()
    assert [len(e.valid) for e in held] == [14 + 2 * 5, 21 + 2 * 4, 14 + 2 * 5]  # of 28 and of 6 of each class


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blurry": 1.0}, r"stream\.blurry: 1\.0 is out of range \(valid: in \[0, 1\)\)"),
        ({"repetition": 1.1}, r"stream\.repetition: 1\.1 is out of range"),
        (
            {"blurry": 0.1, "repetition": 0.1},
            r"stream\.blurry: 0\.1 has no meaning here \(valid: 0\.0; used with repet",
        ),
        ({"blurry": 0.1, "tasks": ["size"]}, r"stream\.blurry: 0\.1 has no meaning here"),
        ({"disjoint": 0.1}, r"stream\.disjoint: 0\.1 has no meaning here \(valid: 0\.0; used with blurry above 0\)"),
        (
            {"experiences": 4},
            r"stream\.experiences: 4 has no meaning here \(valid: null; used with repetition above 0\)",
        ),
        ({"experiences": 2, "repetition": 0.1}, r"stream\.experiences: 2 is below the 3 tasks \(valid: ≥ 3, or null\)"),
        ({"experiences": 99, "repetition": 1.0}, r"stream\.experiences: 99 is too many .* experience \d+ gets none"),
    ],
)
def test_refuses(three, options, message):
    with pytest.raises(UserError, match=message):
        Text(**{**three, **options})


@pytest.mark.slow
def test_a_run_meets_classes_before_their_task(three, tmp_path):
    config = {
        "strategy": {"name": "er", "memory": 8, "replay_batch": 4},
        "stream": {"name": "text", **three, "blurry": 0.2, "train_per_class": 6, "answer": "class", "max_length": 32},
        "backbone": {"name": "text_encoder", "dim": 8, "depth": 1, "heads": 2},
        "loop": {"batch_size": 8, "checkpoint_seconds": None},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
    }
    summary = clplat.run(config, quiet=True).summary
    assert summary["status"] == "complete"
    assert sum(e["train_samples"] for e in summary["experiences"]) == 42
    assert summary["metrics"]["forgetting"] is not None
