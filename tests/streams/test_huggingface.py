"""Hugging Face data sets, with a stand-in for the package, which is not a dependency."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import clplat
from clplat.errors import MissingError, UserError
from clplat.streams.huggingface import HuggingFace

LABELS = np.arange(12) % 3


class Split:
    def __init__(self, **columns: list) -> None:
        self.columns, self.column_names = columns, list(columns)
        self.features = {"label": types.SimpleNamespace(names=["ant", "bee", "cow"])}

    def __getitem__(self, column: str) -> list:
        return self.columns[column]


def images(sizes: list[int], mode: str = "RGB") -> list[Image.Image]:
    return [Image.new(mode, (s, s), i) for i, s in enumerate(sizes)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> types.SimpleNamespace:
    """What the stand-in holds: `hub.result` is returned, or raised."""
    held = types.SimpleNamespace(result=None, asked=[])

    def load_dataset(name: str, config: str | None) -> Any:
        held.asked.append((name, config))
        if isinstance(held.result, Exception):
            raise held.result
        return held.result

    module = types.ModuleType("datasets")
    module.__version__ = "4.1.0"  # type: ignore[attr-defined]
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return held


def test_images_become_bytes(hub: types.SimpleNamespace) -> None:
    part = Split(image=images([6] * 12), label=LABELS.tolist())
    hub.result = {"train": part, "test": part}
    stream = HuggingFace(dataset="some/images", config="plain", experiences=3)
    assert hub.asked == [("some/images", "plain")]
    assert stream.input_shape == (3, 6, 6)
    assert stream.class_names == ("ant", "bee", "cow")
    np.testing.assert_array_equal(stream[0].train.inputs[5, :, 2, 3], [5, 0, 0])
    assert HuggingFace(dataset="some/images", experiences=3, size=4, grey=True).input_shape == (1, 4, 4)


def test_numbers_become_floats(hub: types.SimpleNamespace) -> None:
    features = np.random.default_rng(0).normal(size=(12, 4))
    part = Split(features=features.tolist(), label=LABELS.tolist())
    hub.result = {"train": part, "validation": part}
    stream = HuggingFace(dataset="x", inputs="features", test_split="validation", experiences=3)
    np.testing.assert_allclose(stream[0].train.inputs, features, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"test_split": "testing"}, r"stream\.test_split: 'testing' is not in x \(valid: train, test\)"),
        ({"inputs": "picture"}, r"stream\.inputs: no column 'picture' in x \(valid: image, label, words\)"),
        ({"label": "kind"}, r"stream\.label: no column 'kind'"),
        ({"inputs": "words"}, r"stream\.inputs: neither images nor numbers"),
        ({}, r"stream\.size: images of 2 shapes"),
        ({"size": 0}, r"stream\.size: 0 is out of range"),
        ({"size": 6, "scale": 255.0}, r"stream\.scale: 255\.0 has no meaning for pictures of 8 bits"),
        ({"test_share": 0.0}, r"stream\.test_share: 0\.0 is out of range"),
    ],
    ids=str,
)
def test_refuses(hub: types.SimpleNamespace, options: dict, message: str) -> None:
    part = Split(image=images([6, 7] * 6), label=LABELS.tolist(), words=["w"] * 12)
    hub.result = {"train": part, "test": part}
    with pytest.raises(UserError, match=message):
        HuggingFace(dataset="x", experiences=3, **options)


def test_not_to_be_had(hub: types.SimpleNamespace) -> None:
    hub.result = ConnectionError("offline")
    with pytest.raises(MissingError, match=r"stream\.dataset: x is not a folder.*\(offline\)"):
        HuggingFace(dataset="x")


def test_needs_the_package_in_a_version_that_runs_no_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match="needs the package datasets: pip install"):
        HuggingFace(dataset="x")
    old = types.ModuleType("datasets")
    old.__version__ = "2.19.0"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", old)
    with pytest.raises(UserError, match=r"needs datasets 4 or later, not 2\.19\.0"):
        HuggingFace(dataset="x")


def test_a_set_of_one_split_is_split_and_said(hub: types.SimpleNamespace) -> None:
    hub.result = {"train": Split(image=images([6] * 12), label=LABELS.tolist())}
    stream = HuggingFace(dataset="x", experiences=3, test_share=0.25)
    assert [(len(e.train), len(e.test)) for e in stream] == [(3, 1)] * 3
    said = "stream.test_share: 0.25: x has one split only, of which 3 of 12 samples are held out, always the same ones"
    assert stream.notes == (said,)
    again = HuggingFace(dataset="x", experiences=3, test_share=0.25, seed=5)
    assert all(
        torch.equal(a.test.inputs[a.test.rows], b.test.inputs[b.test.rows]) for a, b in zip(stream, again, strict=True)
    )
    shown = torch.cat([stream[0].train.inputs[:, 0, 0, 0], stream[0].test.inputs[:, 0, 0, 0]])
    assert sorted(shown.tolist()) == list(range(12))  # every picture on one side
    hub.result = {"train": Split(image=images([6] * 3), label=[0, 1, 2])}
    with pytest.raises(UserError, match=r"labels \[0, 1, 2\] have one sample only"):
        HuggingFace(dataset="x", experiences=3)


def test_what_was_held_out_is_said_and_is_a_fact_of_the_run(
    hub: types.SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.result = {"train": Split(image=images([6] * 12), label=LABELS.tolist())}
    result = clplat.run(
        strategy="naive",
        stream={"name": "huggingface", "dataset": "x", "experiences": 3, "test_share": 0.25},
        output=str(tmp_path),
        tracking={"enabled": False},
        quiet=True,
    )
    (said,) = result.summary["stream_notes"]
    assert said.startswith("stream.test_share: 0.25: x has one split only, of which 3 of 12 samples are held out")
    assert f"clplat: {said}" in capsys.readouterr().err.splitlines()


@pytest.mark.parametrize("name", ["validation", "val"])
def test_without_a_test_split_the_validation_split_is_held_out_and_that_is_said(
    hub: types.SimpleNamespace, name: str
) -> None:
    hub.result = {"train": Split(image=images([6] * 6), label=[0, 1, 2] * 2),
                  name: Split(image=images([6] * 3, "L"), label=[2, 1, 0])}  # fmt: skip
    stream = HuggingFace(dataset="x", experiences=3, grey=True)
    assert stream.notes == (f"stream.test_split: x has no split test: its split {name} is the test set",)
    assert [e.test.inputs[e.test.rows].flatten().unique().tolist() for e in stream] == [[2], [1], [0]]
    assert [len(e.train) for e in stream] == [2, 2, 2]
    for asked in ({"test_split": "test"}, {"train_split": name}):  # asked for by name, or learned from already
        with pytest.raises(UserError, match=rf"^stream\.test_split: 'test' is not in x \(valid: train, {name}\)"):
            HuggingFace(dataset="x", **asked)


def test_a_split_that_may_be_anything_is_not_taken_for_a_test_set(hub: types.SimpleNamespace) -> None:
    part = Split(image=images([6] * 3), label=[0, 1, 2])
    hub.result = {"train": part, "unsupervised": part}
    with pytest.raises(UserError, match=r"^stream\.test_split: 'test' is not in x \(valid: train, unsupervised\)"):
        HuggingFace(dataset="x")


def test_deep_pictures_keep_their_range_and_faulty_rows_are_named(hub: types.SimpleNamespace) -> None:
    deep = [Image.fromarray(np.full((6, 6), 5000 * i, np.uint16)) for i in range(12)]
    part = Split(image=deep, label=LABELS.tolist())
    hub.result = {"train": part, "test": part}
    stream = HuggingFace(dataset="x", experiences=3, grey=True)
    np.testing.assert_allclose(stream[0].train.inputs[:, 0, 0, 0], np.arange(12) * 5000 / 65535, rtol=1e-6)
    seen = images([6] * 12, "RGBA")
    seen[7].putalpha(3)
    part.columns["image"] = [*(i.convert("RGB") for i in seen[:7]), *seen[7:8], *(i.convert("RGB") for i in seen[8:])]
    with pytest.raises(UserError, match="the picture in row 7 has transparent pixels"):
        HuggingFace(dataset="x", experiences=3)
    part.columns["image"][7] = None
    with pytest.raises(UserError, match="row 7 holds NoneType"):
        HuggingFace(dataset="x", experiences=3)


def test_classes_named_differently_are_refused(hub: types.SimpleNamespace) -> None:
    train, test = (Split(image=images([6] * 12), label=LABELS.tolist()) for _ in range(2))
    test.features = {"label": types.SimpleNamespace(names=["cow", "bee", "ant"])}
    hub.result = {"train": train, "test": test}
    with pytest.raises(UserError, match="classes of train and test are named differently"):
        HuggingFace(dataset="x")
