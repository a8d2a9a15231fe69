"""Weights in half precision: runs learn by them, go on bit for bit, and are refused where that was not seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded import ADAPTERS, IMAGES, REPLAY, SHARDED, config, ended, texts

import clplat
from clplat.config.resolve import resolve
from clplat.errors import Interrupted, UserError
from clplat.run.build import build

HALF = {"fabric": {"precision": "bf16-true"}}
LEARNS = {"max_steps": None, "max_epochs": 4, "batch_size": 16, "accumulate": 1, "clip_norm": None, "stop_after": 1}
STRATEGIES: dict[str, dict[str, Any]] = {
    "naive": {"lr": 0.05}, "er": {"lr": 0.05, **REPLAY}, "lora": {**ADAPTERS, "lr": 0.05, "rank": 4},
}  # fmt: skip


def weights(state: dict[str, Any], part: str) -> dict[str, torch.Tensor]:
    """Those of a part of the model, without adapters."""
    named = {k: v for k, v in state["strategy"].items() if k.startswith(f"model.{part}.") and ".lora_" not in k}
    return {k: v for k, v in named.items() if isinstance(v, torch.Tensor) and v.is_floating_point()}


@pytest.mark.parametrize("name", ["naive", pytest.param("er", marks=pytest.mark.slow), "lora"])
def test_it_learns_as_by_wide_weights_in_half_the_memory(tmp_path: Path, name: str) -> None:
    """Rounded to 8 bits the loss is within 0.15 of that of 32 bits, and both are far from that of chance, ln 5."""
    losses, states = [], []
    stream, backbone = {"name": "digits", "experiences": 2}, IMAGES["backbone"] | {"depth": 1}
    given = {"stream": stream, "backbone": backbone, "strategy": {"name": name, **STRATEGIES[name]}, "loop": LEARNS}
    for precision in ("32-true", "bf16-true"):
        found = clplat.run(config(tmp_path / precision, given, fabric={"precision": precision}), quiet=True)
        assert found.accuracy_matrix[1][0] > 0.5  # five classes
        lines = [json.loads(line)["metrics"] for line in (found.run_dir / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["train/loss"] for line in lines if "train/loss" in line][-1])
        states.append(ended(tmp_path / precision))
        said = [n for n in found.summary["stream_notes"] if "weights are trained in it" in n]
        assert len(said) == (precision == "bf16-true" and name != "lora")
    assert losses[1] == pytest.approx(losses[0], abs=0.15)
    wide, half = (weights(state, "backbone") for state in states)
    assert {v.dtype for v in half.values()} == {torch.bfloat16}
    assert 2 * sum(v.nbytes for v in half.values()) == sum(v.nbytes for v in wide.values())
    assert {v.dtype for v in weights(states[1], "head").values()} == {torch.float32}
    learner = clplat.load(found.run_dir)
    inputs = torch.rand(3, 1, 8, 8)
    assert learner.model.features(inputs).dtype == learner.model(inputs).dtype == torch.float32
    assert {p.dtype for n, p in learner.model.backbone.named_parameters() if ".lora_" not in n} == {torch.bfloat16}
    assert {p.dtype for n, p in learner.model.backbone.named_parameters() if ".lora_" in n} <= {torch.float32}


def test_a_run_goes_on_bit_for_bit_and_from_another_it_takes_rounded_weights(tmp_path: Path) -> None:
    strategy = {"name": f"{SHARDED}:Stopped", "told": str(tmp_path / "told"), "momentum": 0.9, "lr": 0.05, **REPLAY}
    given = {**IMAGES, "loop": {"max_steps": 6, "accumulate": 1, "stop_after": 1}, "strategy": strategy}
    with pytest.raises(Interrupted):
        clplat.run(config(tmp_path / "stopped", given, **HALF), quiet=True)
    (stopped,) = (tmp_path / "stopped").rglob("config.yaml")
    clplat.resume(stopped.parent, quiet=True)
    straight = clplat.run(config(tmp_path / "straight", given, **HALF), quiet=True)
    found, expected = (ended(tmp_path / name) for name in ("stopped", "straight"))
    assert found["record"]["matrix"] == expected["record"]["matrix"]
    for key, value in expected["strategy"].items():
        if isinstance(value, torch.Tensor):
            assert value.dtype == found["strategy"][key].dtype
            assert torch.equal(value, found["strategy"][key]), key
    wide = clplat.run(config(tmp_path / "wide", {**given, "strategy": "naive"}), quiet=True)
    for start in (wide, straight):
        _, begun = build(resolve(config=config(tmp_path, given, **HALF)), start.run_dir)
        for name, value in clplat.load(start.run_dir).model.backbone.state_dict().items():
            assert torch.equal(begun.model.backbone.state_dict()[name], value.bfloat16()), name


@pytest.mark.parametrize(("precision", "dtype"), [("32-true", "bfloat16"), ("16-true", "float32")])
def test_texts_are_encoded_by_frozen_weights_in_half_precision(tmp_path: Path, precision: str, dtype: str) -> None:
    """By an option of the backbone, and by the run's precision; the head is in single precision."""
    given = {**texts(tmp_path, name="text_encoder", dtype=dtype), "strategy": {"name": "lora", **ADAPTERS}}
    clplat.run(config(tmp_path / "run", given, fabric={"precision": precision}), quiet=True)
    state = ended(tmp_path / "run")
    assert {v.dtype for v in weights(state, "backbone").values()} == {getattr(torch, dtype.replace("float32", "half"))}
    assert {v.dtype for v in weights(state, "head").values()} == {torch.float32}


@pytest.mark.parametrize(("given", "line"), [
    ({"strategy": "ewc"}, "bf16-true, but EWC has not been seen to learn by such weights (valid: 32-true, bf16-mixed)"),
    ({"strategy": "lwf"}, "bf16-true, but LwF has not been seen to learn by such weights"),
    ({"strategy": "acil"}, "bf16-true, but ACIL has not been seen to learn by such weights"),
    ({"backbone": "cnn"}, "bf16-true, but backbone cnn has not been seen to compute in it (valid: language_model,"),
    ({"strategy": {"name": "naive", "optimizer": "adamw"}}, "bf16-true, but strategy.optimizer is adamw"),
    ({"fabric": {"precision": "16-true"}}, "16-true, but Naive trains the backbone, whose small gradients are zero"),
    ({"merge": "lines"}, "bf16-true, but merge: lines takes parts of what a step has changed"),
    ({"loop": {"diagnostics": ["intruder_dimensions"]}}, "bf16-true, but loop.diagnostics decompose weights"),
])  # fmt: skip
def test_what_was_not_seen_is_refused(tmp_path: Path, given: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError) as raised:
        build(resolve(config=config(tmp_path, {**IMAGES, "strategy": "naive"}, **{**HALF, **given})))
    assert any(f.startswith(f"fabric.precision: {line}") for f in raised.value.faults)


def test_a_type_of_the_backbone_that_is_another_is_refused(tmp_path: Path) -> None:
    given = {**texts(tmp_path, name="text_encoder", dtype="bfloat16"), "strategy": {"name": "lora", **ADAPTERS}}
    with pytest.raises(UserError, match=r"fabric\.precision: 16-true, but backbone\.dtype is bfloat16"):
        build(resolve(config=config(tmp_path, given, fabric={"precision": "16-true"})))
