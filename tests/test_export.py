"""What is exported predicts, without clplat's own run, what the run measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from test_loaded import run
from texts import LABELS, write_sets

import clplat
from clplat.cli import main
from clplat.errors import UserError
from clplat.streams.digits import Digits

SMALL = {"train_per_class": 30, "test_per_class": 10}


def share(found: torch.Tensor, labels: torch.Tensor) -> float:
    return float((found == labels).double().mean())


def test_tensors_of_a_perceptron_give_the_last_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two matrix products and what learner.json says: no code of clplat's is asked."""
    result = run(tmp_path, strategy="er", stream={"name": "digits", **SMALL}, backbone={"name": "mlp", "hidden": [16]})
    assert main(["export", str(result.run_dir), "--dest", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out == f"exported: {tmp_path / 'out'}\n"
    tensors, facts = (
        load_file(tmp_path / "out/model.safetensors"),
        json.loads((tmp_path / "out/learner.json").read_text()),
    )
    assert facts["preprocessing"]["white"] == 16
    assert facts["classes"] == list(map(str, range(10)))
    (first, offset), (last, shift) = (
        (tensors[f"{n}.weight"], tensors[f"{n}.bias"]) for n in ("backbone.net.0.0", "head")
    )
    for e, right in zip(Digits(seed=0, **SMALL), result.accuracy_matrix[-1], strict=True):
        raw = (e.test.all()[0][:, 0] * 16).round()
        logits = F.relu(raw.flatten(1) / 16 @ first.T + offset) @ last.T + shift
        assert share(logits.argmax(1), e.test.targets()) == pytest.approx(right)
    with pytest.raises(UserError, match="is there already"):
        clplat.export(result.run_dir, dest=tmp_path / "out")


def test_what_was_given_in_python_is_given_to_the_export(tmp_path: Path) -> None:
    """Arrays need not be: an export takes no data."""
    inputs, labels = torch.eye(6).repeat(4, 1), torch.arange(24) % 2
    stream = {"name": "arrays", "train": (inputs, labels), "test": (inputs, labels), "experiences": 1}
    net = torch.nn.Linear(6, 4)
    result = run(tmp_path, strategy="naive", stream=stream, backbone=net, loop={"max_steps": 2})
    with pytest.raises(UserError, match=r"^backbone: Linear@python:\w+ was given in Python"):
        clplat.export(result.run_dir)
    tensors = load_file(clplat.export(result.run_dir, backbone=net) / "model.safetensors")
    first, last = (next(tensors[k] for k in tensors if k.startswith(p) and k.endswith("weight")) for p in "bh")
    offset, shift = (next(tensors[k] for k in tensors if k.startswith(p) and k.endswith("bias")) for p in "bh")
    found = (inputs @ first.T + offset) @ last.T + shift
    torch.testing.assert_close(found, clplat.load(result.run_dir, backbone=net).predict(inputs))


def test_adapters_are_merged_into_the_layers(tmp_path: Path) -> None:
    from clplat.backbones.heads import Growing
    from clplat.backbones.vit import vit_micro
    from clplat.stream import Experience, Kind

    result = run(tmp_path, strategy={"name": "lora", "lr": 1e-2}, stream={"name": "digits", **SMALL},
                 backbone={"name": "vit_micro", "dim": 16}, loop={"max_steps": 20})  # fmt: skip
    tensors = load_file(clplat.export(result.run_dir) / "model.safetensors")
    assert not [name for name in tensors if "lora" in name or "base_layer" in name]
    backbone, head = vit_micro((1, 8, 8), dim=16), Growing(16, 10)
    head.grow(Experience(0, "all", Kind.LEARN, None, classes=tuple(range(10))))
    for part, own in ((backbone, "backbone."), (head, "head.")):
        part.load_state_dict({k.removeprefix(own): v for k, v in tensors.items() if k.startswith(own)})
    learner = clplat.load(result.run_dir)
    changed = learner.model.state_dict()
    assert any("lora_B" in name and bool(value.any()) for name, value in changed.items())
    with torch.no_grad():
        for e, right in zip(Digits(seed=0, **SMALL), result.accuracy_matrix[-1], strict=True):
            x, y = e.test.all()
            logits = head(backbone.eval()(x))
            torch.testing.assert_close(logits, learner(x).scores, rtol=1e-3, atol=1e-3)
            assert share(logits.argmax(1), y) == pytest.approx(right)


@pytest.mark.parametrize("strategy", [{"name": "ilora"}, {"name": "svd_orthogonal"}], ids=lambda s: s["name"])
def test_slow_copies_and_factors_are_put_into_the_layers(strategy: dict[str, Any], tmp_path: Path) -> None:
    """As the network predicts that `clplat.load` gives: the export compares the two itself."""
    result = run(tmp_path, strategy={"lr": 1e-2, **strategy}, stream={"name": "digits", "experiences": 2, **SMALL},
                 backbone={"name": "vit_micro", "dim": 16}, loop={"max_steps": 3})  # fmt: skip
    tensors = load_file(clplat.export(result.run_dir) / "model.safetensors")
    learner = clplat.load(result.run_dir)
    slow = learner.slow.named()["head.weight"] if strategy["name"] == "ilora" else learner.model.head.weight
    torch.testing.assert_close(tensors["head.weight"], slow.detach())


@pytest.mark.parametrize(
    ("strategy", "to", "fault"),
    [
        ({"name": "hnet", "hidden": [8]}, "safetensors", "hnet has no network of its own"),
        ({"name": "acil", "width": 32}, "safetensors", "acil predicts by more than its network"),
        ({"name": "naive"}, "hf", "hf is defined for language models and CLIP of transformers, not for MLP"),
        ({"name": "naive"}, "onxx", r"'onxx' is unknown \(valid: safetensors, hf, "),
    ],
)
def test_what_would_predict_otherwise_is_refused(strategy: dict[str, Any], to: str, fault: str, tmp_path: Path) -> None:
    result = run(tmp_path, strategy=strategy, stream={"name": "digits", "experiences": 2, **SMALL},
                 backbone={"name": "mlp", "hidden": [16]}, loop={"max_steps": 2})  # fmt: skip
    with pytest.raises(UserError, match=fault):
        clplat.export(result.run_dir, to=to)
    assert not (result.run_dir / "export").exists()


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "t5"])
def test_transformers_reads_the_language_model(family: str, tmp_path: Path) -> None:
    """Answers scored one by one by transformers alone: the last row."""
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    stream = {"name": "text", "benchmark": "jsonl", "path": str(write_sets(tmp_path / "sets")),
              "tasks": ["color", "size"]}  # fmt: skip
    backbone = {"name": "language_model", "dim": 16, "depth": 1, "heads": 2, "family": family}
    strategy = {"name": "lora", "lr": 1e-2, "projections": []}
    result = run(tmp_path, strategy=strategy, stream=stream, backbone=backbone, loop={"max_steps": 20, "batch_size": 4})
    folder = clplat.export(result.run_dir, to="hf")
    facts = json.loads((folder / "learner.json").read_text())
    net = (AutoModelForCausalLM if family == "llama" else AutoModelForSeq2SeqLM).from_pretrained(folder).eval()

    def likelihood(prompt: list[int], answer: list[int]) -> float:
        with torch.no_grad():
            if family == "t5":
                fed = torch.tensor([[net.config.decoder_start_token_id, *answer[:-1]]])
                logits = net(input_ids=torch.tensor([prompt]), decoder_input_ids=fed).logits[0]
            else:
                logits = net(input_ids=torch.tensor([prompt + answer[:-1]])).logits[0, len(prompt) - 1 :]
        return float(logits.log_softmax(1)[range(len(answer)), answer].sum())

    answers = [[i for i in row if i >= 0] for row in facts["class_tokens"]]
    assert facts["preprocessing"]["text"]["tokenizer"] == "bytes"
    for (task, labels), right in zip(LABELS.items(), result.accuracy_matrix[-1], strict=True):
        found = []
        for i in range(6):
            prompt = [1, *(byte + 3 for byte in f"{task} {i}?".encode())]
            scores = [likelihood(prompt, answer) for answer in answers]
            found.append(facts["classes"][scores.index(max(scores))] == labels[i % len(labels)])
        assert sum(found) / 6 == pytest.approx(right)
