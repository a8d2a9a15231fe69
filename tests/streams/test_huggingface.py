"""Hugging Face data sets, with a stand-in for the package, which is not a dependency."""

from __future__ import annotations

import sys
import types
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
