"""Nothing in a run's folder derives from single erased samples once they are let go: found by their bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixed import mixed_config
from safetensors.torch import load_file

import clplat
from clplat.cli import main
from clplat.config.resolve import resolve
from clplat.report.evidence import _relearning
from clplat.run.build import build_stream

STRATEGIES = (
    pytest.param("acu", marks=pytest.mark.slow),
    "finetune_retained",
    "gradient_ascent",
    "random_labels",
    "retrain",
)


def config(folder: Path, strategy: str, requests: list[Any], **audit: Any) -> dict[str, Any]:
    stream = {"name": "unlearning", "base": "digits", "base_options": {"experiences": 2}, "requests": requests}
    own = mixed_config(folder) | {"strategy": strategy, "stream": stream, "head": "linear"}
    own["loop"] |= {"max_epochs": 1, "batch_size": 32, "eval_every": None, "checkpoint_every": 3}
    own["audit"] = {"samples": 60, "relearn_steps": 4, **audit}
    return own


def content(run_dir: Path) -> bytes:
    """All bytes below a folder; tensors of 32 bits also as what they are in 64, and the other way round."""
    found = []
    for path in sorted(p for p in run_dir.rglob("*") if p.is_file()):
        found.append(path.read_bytes())
        if path.suffix == ".safetensors":
            for tensor in load_file(path).values():
                if tensor.is_floating_point():
                    found += [
                        tensor.double().contiguous().numpy().tobytes(),
                        tensor.float().contiguous().numpy().tobytes(),
                    ]
    return b"\0".join(found)


def rows_of(values: torch.Tensor) -> list[bytes]:
    """Each sample's values (n, ...) as they would stand in a file, in 32 and in 64 bits."""
    return [row.contiguous().numpy().tobytes() for kind in (values.float(), values.double()) for row in kind.flatten(1)]


def no_scores(run_dir: Path) -> bool:
    """Whether audits were made and hold nothing of single samples."""
    files = list((run_dir / "audit").glob("*/*.safetensors"))
    return bool(files) and not any(load_file(file) for file in files)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_pixel_feature_or_output_of_an_erased_sample_is_left(tmp_path: Path, strategy: str) -> None:
    run_dir = clplat.run(config(tmp_path, strategy, ["class:3"]), quiet=True).run_dir
    assert no_scores(run_dir)
    stream = build_stream(resolve(config=run_dir / "config.yaml"))
    inputs, _ = stream[2].train.all()
    before = clplat.load(run_dir)
    clplat.forget(run_dir, "class:4", purge=True)
    kept = content(run_dir)
    more, _ = _late(run_dir).all()
    for values in (inputs, more):
        prepared = stream.prepare(values, False)
        model = before.model
        with torch.no_grad():
            traces = rows_of(values) + rows_of(model.features(prepared)) + rows_of(before.predict(prepared))
        assert not [t for t in traces if t in kept]
    assert len(list((run_dir / "checkpoints").iterdir())) == 1
    assert json.loads((run_dir / "erasure.json").read_text())["traces"] == []


def _late(run_dir: Path) -> Any:
    from clplat.erasure import late

    stream = build_stream(resolve(config=run_dir / "config.yaml"))
    late.extend(stream, run_dir)
    return stream[len(stream) - 1].train


def test_the_search_finds_what_is_kept_on_request(tmp_path: Path) -> None:
    """The search above can find something: with keep_scores outputs of erased samples are there, and are listed."""
    run_dir = clplat.run(config(tmp_path, "gradient_ascent", ["class:3"], keep_scores=True), quiet=True).run_dir
    scores = load_file(run_dir / "audit" / "002" / "original.safetensors")
    assert all(row in content(run_dir) for row in rows_of(scores["erased.logits"])[: len(scores["erased.logits"])])
    traces = {t["path"] for t in json.loads((run_dir / "erasure.json").read_text())["traces"]}
    assert {"audit/002/original.safetensors", "audit/002/unlearned.safetensors"} <= traces
    assert any(t.startswith("checkpoints/") for t in traces)


def test_letting_go_keeps_every_figure_of_the_report(tmp_path: Path) -> None:
    """The report of a run that kept its scores, and again when they are gone."""
    run_dir = clplat.run(config(tmp_path, "gradient_ascent", [["sample:5", "sample:8", "sample:11"]], keep_scores=True),
                         quiet=True).run_dir  # fmt: skip
    before = json.loads((run_dir / "erasure.json").read_text())
    assert not no_scores(run_dir)
    assert main(["forget", str(run_dir), "--purge", "-q"]) == 0
    assert no_scores(run_dir)
    after = json.loads((run_dir / "erasure.json").read_text())
    for key in ("requests", "summary", "ledger"):
        assert after[key] == before[key]
    (entry,) = after["requests"]
    logged = [json.loads(line)["metrics"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    aucs = [m["audit/loss_auc"] for m in logged if "audit/loss_auc" in m]
    assert aucs == [entry["models"]["unlearned"]["loss_auc"]]  # one definition: of held-out samples of these classes
    assert entry["models"]["unlearned"]["unseen"] == "held-out samples of the same classes"


def test_a_request_made_late_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = clplat.run(config(tmp_path, "finetune_retained", ["class:3"]), quiet=True).run_dir
    assert main(["forget", str(run_dir), "class:1", "-q"]) == 0
    assert "erasure.html" in capsys.readouterr().out
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [e.get("late", False) for e in summary["experiences"]] == [False, False, False, True]
    assert [r["late"] for r in json.loads((run_dir / "erasure.json").read_text())["requests"]] == [False, True]
    assert "made after the run" in (run_dir / "erasure.html").read_text()
    assert main(["forget", str(run_dir)]) == 2
    assert "or --purge" in capsys.readouterr().err


def test_what_was_never_known_is_not_learned_again() -> None:
    """Samples that the model before the request named wrong, all of them: no index of relearning is made of that."""
    tried = {"positions": [0, 1], "tolerance": 0.05, "settings": {"steps": 3}, "accuracies": [0.0, 1.0], "why": None}
    scores = {"erased.logits": np.array([[1.0, 0.0], [1.0, 0.0]]), "erased.labels": np.array([1, 1])}
    why: dict[str, str] = {}
    assert _relearning((scores, {}), ({}, {"relearn": tried}), None, why) is None
    assert "nothing to learn again" in why["relearning"]
    scores["erased.labels"] = np.array([1, 0])
    found = _relearning((scores, {}), ({}, {"relearn": tried}), None, {})
    assert found is not None
    assert found["target"] == pytest.approx(0.95 * 0.5)
