"""The digits stream: scikit-learn's data and split, without importing scikit-learn."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

from clplat.data.datasets import stratified_split
from clplat.errors import MissingError
from clplat.streams.digits import Digits, read_digits


def test_split_is_that_of_scikit_learn() -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    images = (data.data / 16).astype(np.float32).reshape(-1, 1, 8, 8)
    parts = train_test_split(images, data.target, test_size=0.2, stratify=data.target, random_state=0)
    train, test, train_labels, test_labels = (torch.from_numpy(p) for p in parts)
    stream = Digits(seed=3)
    assert torch.equal(stream[0].train.inputs, train)
    assert torch.equal(stream[0].train.labels, train_labels)
    assert torch.equal(stream[0].test.inputs, test)
    assert torch.equal(stream[0].test.labels, test_labels)


@pytest.mark.parametrize("random_state", range(5))
@pytest.mark.parametrize("share", [0.1, 0.25, 0.33])
def test_stratified_split_of_uneven_classes_is_that_of_scikit_learn(share: float, random_state: int) -> None:
    from sklearn.model_selection import train_test_split

    labels = np.random.default_rng(random_state).permutation(np.repeat([0, 2, 3, 7], [5, 9, 9, 30]))
    expected = train_test_split(np.arange(len(labels)), test_size=share, stratify=labels, random_state=random_state)
    found = stratified_split(labels, test_share=share, random_state=random_state)
    assert [f.tolist() for f in found] == [e.tolist() for e in expected]


def test_five_experiences_of_two_digits_in_order() -> None:
    stream = Digits(seed=0)
    assert [e.classes for e in stream] == [(0, 1), (2, 3), (4, 5), (6, 7), (8, 9)]
    assert [len(e.train) for e in stream] == [288, 288, 290, 288, 283]
    assert [len(e.test) for e in stream] == [72, 72, 73, 72, 71]
    assert (stream.num_classes, stream.input_shape) == (10, (1, 8, 8))
    inputs, _ = stream[0].train.all()
    assert inputs.dtype == torch.float32
    assert inputs.min() == 0
    assert inputs.max() == 1
    assert torch.equal(stream.prepare(inputs, training=True), inputs)


def test_construction_is_fast_and_imports_no_scikit_learn() -> None:
    Digits(seed=0)
    taken = []
    for seed in range(3):
        start = time.perf_counter()
        Digits(seed=seed)
        taken.append(time.perf_counter() - start)
    assert min(taken) < 0.3
    code = "import sys; from clplat.streams.digits import Digits; Digits(seed=0); sys.exit('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_says_what_to_do_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingError, match="install scikit-learn again"):
        read_digits()
