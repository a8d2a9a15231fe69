"""The ONNX file of a run: onnxruntime alone gives the learner's logits for raw inputs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from test_loaded import run
from texts import write_sets

import clplat
from clplat.errors import MissingError, UserError
from clplat.streams.digits import Digits

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed: clplat[onnx]")
SMALL = {"train_per_class": 20, "test_per_class": 8}


def logits(folder: Path, inputs: np.ndarray) -> torch.Tensor:
    session = onnxruntime.InferenceSession(folder / "model.onnx", providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(["logits"], {"inputs": inputs})[0])


def test_pictures(tmp_path: Path) -> None:
    """Adapters in use, integers that learner.json says how to divide, and batches of any size."""
    result = run(tmp_path, strategy={"name": "lora", "lr": 1e-2}, stream={"name": "digits", **SMALL},
                 backbone={"name": "vit_micro", "dim": 16}, loop={"max_steps": 5})  # fmt: skip
    folder, learner = clplat.export(result.run_dir, to="onnx"), clplat.load(result.run_dir)
    raw = (Digits(seed=0, **SMALL)[0].test.all()[0] * 16).round().byte().numpy()
    white = json.loads((folder / "learner.json").read_text())["preprocessing"]["white"]
    scores = learner(raw).scores
    for count in (1, 5, len(raw)):
        found = logits(folder, raw[:count].astype(np.float32) / np.float32(white))
        torch.testing.assert_close(found, scores[:count], rtol=1e-4, atol=1e-4)


def test_texts_of_several_lengths(tmp_path: Path) -> None:
    stream = {"name": "text", "benchmark": "jsonl", "path": str(write_sets(tmp_path / "sets")), "tasks": ["color"],
              "tokenizer": "bytes", "answer": "class"}  # fmt: skip
    result = run(tmp_path, strategy={"name": "naive"}, stream=stream,
                 backbone={"name": "text_encoder", "dim": 16, "depth": 1}, loop={"max_steps": 2})  # fmt: skip
    folder, learner = clplat.export(result.run_dir, to="onnx"), clplat.load(result.run_dir)
    texts = ["color 1?", "red", "blue 12"]
    held = learner.of_run.raw.held(texts)
    longest = json.loads((folder / "learner.json").read_text())["preprocessing"]["shape"][-1]
    ids = F.pad(held, (0, longest - held.shape[2]), value=-1).long()
    assert bool((held[:, 0] < 0).any())
    torch.testing.assert_close(logits(folder, ids.numpy()), learner(texts).scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("stream", "changed", "fault"),
    [
        ({"scenario": "task"}, {}, "onnx takes inputs alone, but this run was told the task"),
        ({}, {"head": "ncm"}, "torch can't write this network in ONNX"),
    ],
    ids=["task", "operation"],
)
def test_what_onnx_cannot_say_is_refused(stream: dict[str, Any], changed: Any, fault: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {"strategy": "er", "backbone": {"name": "mlp", "hidden": [16]}, **changed}
    stream = {"name": "digits", "experiences": 2, **SMALL, **stream}
    result = run(tmp_path, stream=stream, loop={"max_steps": 2}, **given)
    with pytest.raises(UserError, match=fault) as refused:
        clplat.export(result.run_dir, to="onnx")
    assert len(refused.value.faults) == 1
    assert not (result.run_dir / "export").exists()


def test_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = run(tmp_path, strategy="naive", stream={"name": "digits", **SMALL}, backbone="mlp", loop={"max_steps": 1})
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(MissingError, match=r"onnx needs onnxscript; install it: pip install 'clplat\[onnx\]'"):
        clplat.export(result.run_dir, to="onnx")
