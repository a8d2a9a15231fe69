"""Building the parts: every fault at once, nothing left behind by a run that is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from texts import write_sets

import clplat
from clplat.backbones.text_encoder import text_encoder
from clplat.config.resolve import resolve
from clplat.data.datasets import find_root
from clplat.errors import MissingError, UserError
from clplat.run.build import build

BAD = {
    "strategy": {"name": "er", "memory": -5, "lr": -1.0, "momentum": 3.0},
    "stream": {"name": "digits", "experiences": 0, "blurry": 7.0},
    "backbone": {"name": "mlp", "hidden": [-4]},
    "head": {"name": "cosine", "scale": 0.0},
}


def test_all_faults_of_all_parts_come_at_once() -> None:
    with pytest.raises(UserError) as caught:
        build(resolve(config=BAD))
    keys = [fault.partition(":")[0] for fault in caught.value.faults]
    assert sorted(keys) == sorted(
        ["stream.experiences", "stream.blurry", "backbone.hidden", "head.scale", "strategy.memory", "strategy.lr",
         "strategy.momentum"]
    )  # fmt: skip
    assert all("out of range (valid: " in fault for fault in caught.value.faults)


def test_a_refused_run_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLPLAT_DATA", raising=False)
    with pytest.raises(UserError, match=r"strategy\.lr"):
        clplat.run(strategy="naive", output=str(tmp_path / "runs"), quiet=True, **{"strategy.lr": -1.0})
    with pytest.raises(MissingError, match="CLPLAT_DATA"):
        clplat.run(strategy="naive", stream="images", output=str(tmp_path / "runs"), quiet=True)
    assert not list(tmp_path.iterdir())


def test_missing_data_do_not_hide_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLPLAT_DATA", raising=False)
    with pytest.raises(UserError) as caught:
        build(resolve(strategy="er", stream="images", **{"strategy.memory": 0}))
    assert any(f.startswith("strategy.memory: 0") for f in caught.value.faults)
    assert any("CLPLAT_DATA" in f for f in caught.value.faults)


def test_parts_are_initialised_from_the_seed_alone() -> None:
    first = build(resolve(strategy="naive", seed=3))[1].state_dict()
    torch.rand(10)
    again, other = (build(resolve(strategy="naive", seed=s))[1].state_dict() for s in (3, 4))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not all(torch.equal(first[k], other[k]) for k in first)


@pytest.mark.parametrize("strategy", ["er", "derpp", "joint", "cumulative", "lwf"])
def test_a_task_wise_head_is_refused_where_a_class_does_not_tell_its_task(strategy: str) -> None:
    options = {"stream.scenario": "permuted", "stream.tell_task": True}
    with pytest.raises(UserError, match=r"head: taskwise tells the task of a sample .* class 0 is in tasks 0, 1"):
        build(resolve(strategy=strategy, head="taskwise", **options))
    build(resolve(strategy=strategy, head="taskwise", **{"stream.scenario": "task"}))


@pytest.mark.parametrize("strategy", ["svd_orthogonal", "naive", "lora"])
def test_weights_in_bfloat16_are_refused_where_they_would_be_trained(strategy: str, tmp_path: Path) -> None:
    config = resolve(
        strategy=strategy, stream="text", backbone="language_model",
        **{"stream.benchmark": "jsonl", "stream.path": str(write_sets(tmp_path)), "stream.tasks": ["color"],
           "stream.tokenizer": "bytes", "stream.max_length": 32, "backbone.vocabulary": 300, "backbone.dim": 16,
           "backbone.dtype": "bfloat16"},
    )  # fmt: skip
    if strategy == "lora":
        assert {p.dtype for p in build(config)[1].parameters() if not p.requires_grad} == {torch.bfloat16}
    else:
        with pytest.raises(UserError, match=r"backbone\.dtype: bfloat16 loses most steps of the weights, which"):
            build(config)


def test_what_a_strategy_notes_is_told_with_what_the_stream_does() -> None:
    hnet = {"strategy": "hnet", "backbone": {"name": "mlp", "hidden": [2]}, "stream.scenario": "task"}
    told = {head: build(resolve(head=head, **hnet))[0].notes for head in ("growing", "taskwise")}
    (note,) = set(told["taskwise"]) - set(told["growing"])
    assert note.startswith("head: taskwise: each task's rows are generated")


@pytest.mark.parametrize(("accumulate", "told"), [(1, 0), (2, 1)])
def test_accumulated_batches_that_are_another_step_are_told(accumulate: int, told: int) -> None:
    loop = {"accumulate": accumulate}
    stream, _ = build(
        resolve(config={"strategy": {"name": "loramoe"}, "backbone": {"name": "vit_micro"}, "loop": loop})
    )
    said = "loop.accumulate: 2 batches are another step than one of their size: its experts are to share the samples"
    assert sum(note.startswith(said) for note in stream.notes) == told


def test_weights_and_tokenizers_are_found_below_the_data_root_that_a_run_is_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As data are; before, below $CLPLAT_DATA alone."""
    monkeypatch.delenv("CLPLAT_DATA", raising=False)
    made = text_encoder((2, 32), dim=16, depth=1, heads=2, vocabulary=300)
    made.net.save_pretrained(tmp_path / "weights" / "small")
    given = {
        "stream": {
            "name": "text",
            "benchmark": "jsonl",
            "path": str(write_sets(tmp_path)),
            "tasks": ["color"],
            "tokenizer": "bytes",
        },
        "strategy": "naive",
        "backbone": {"name": "text_encoder", "weights": "small"},
    }
    with pytest.raises(MissingError, match=r"weights/ of the data root \(not set\)"):
        build(resolve(config=given))
    _, strategy = build(resolve(config=given | {"data_root": str(tmp_path)}))
    for name, value in made.net.state_dict().items():
        assert torch.equal(strategy.model.backbone.net.state_dict()[name], value)  # type: ignore[union-attr, operator]
    assert find_root(None) is None  # within the building alone
