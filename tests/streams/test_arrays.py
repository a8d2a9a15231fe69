"""A user's own arrays, from a file or from Python."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from clplat.errors import MissingError, UserError
from clplat.streams.arrays import Arrays

RNG = np.random.default_rng(0)
TRAIN = RNG.normal(size=(40, 5)), np.arange(40) % 4
TEST = RNG.normal(size=(12, 5)), np.arange(12) % 4
NAMED = {"train_inputs": TRAIN[0], "train_labels": TRAIN[1], "test_inputs": TEST[0], "test_labels": TEST[1]}


def test_from_python() -> None:
    stream = Arrays(train=TRAIN, test=TEST, experiences=2)
    assert (stream.num_classes, stream.input_shape, len(stream)) == (4, (5,), 2)
    assert stream[0].train.inputs.dtype == torch.float32
    np.testing.assert_allclose(stream[0].train.inputs, TRAIN[0], rtol=1e-6)
    assert stream[0].train.targets().unique().tolist() == [0, 1]


def test_tensors_and_bytes_stay_as_they_are() -> None:
    images = torch.randint(0, 256, (40, 3, 4, 4), dtype=torch.uint8)
    labels = torch.from_numpy(TRAIN[1])
    stream = Arrays(train=(images, labels), test=(images, labels), experiences=4, scenario="rotated")
    assert stream[0].train.inputs.data_ptr() == images.data_ptr()


def test_npz_and_safetensors_hold_the_same(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    np.savez(tmp_path / "own.npz", **NAMED)
    save_file(NAMED, tmp_path / "own.safetensors")
    python = Arrays(train=TRAIN, test=TEST, experiences=2)
    for suffix in ("npz", "safetensors"):
        stream = Arrays(path=str(tmp_path / f"own.{suffix}"), experiences=2)
        for a, b in zip(stream, python, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.train.all(), b.train.all(), strict=True))
            assert all(torch.equal(x, y) for x, y in zip(a.test.all(), b.test.all(), strict=True))


def test_relative_path_in_the_data_root(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", **NAMED)
    assert len(Arrays(path="own.npz", data_root=str(tmp_path), experiences=2)) == 2


def test_domains() -> None:
    train, test = (*TRAIN, np.arange(40) // 20), (*TEST, np.arange(12) // 6)
    stream = Arrays(train=train, test=test, scenario="domain", experiences=2)
    assert stream[1].train.rows.tolist() == list(range(20, 40))
    assert stream[1].test.rows.tolist() == list(range(6, 12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"stream\.path: None \(valid: a file"),
        ({"train": TRAIN}, r"valid: a file, or in Python both"),
        ({"path": "own.npz", "train": TRAIN, "test": TEST}, r"in its place"),
        ({"train": "x", "test": TEST}, r"stream\.train: str \(valid in Python: \(inputs, labels\)"),
        ({"path": "own.pkl"}, r"unknown type \(valid: \.npz, \.safetensors; nothing is unpickled\)"),
        ({"train": TRAIN, "test": (TEST[0][:, :3], TEST[1])}, r"inputs differ: train \(5,\).*test \(3,\)"),
        ({"train": (TRAIN[0].astype(str), TRAIN[1]), "test": TEST}, r"train_inputs holds <U"),
        ({"train": (TRAIN[0][:9], TRAIN[1]), "test": TEST}, r"train labels \(40,\) int64 for 9 inputs"),
        ({"train": (*TRAIN, np.zeros(3, int)), "test": (*TEST, np.zeros(12, int))}, r"train domains \(3,\)"),
    ],
    ids=str,
)
def test_refuses(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Arrays(**options)


def test_missing_and_damaged_files(tmp_path: Path) -> None:
    for suffix in ("npz", "safetensors"):
        file = tmp_path / f"own.{suffix}"
        with pytest.raises(MissingError, match="is missing"):
            Arrays(path=str(file))
        file.write_bytes(b"\x01\x02 not an archive")
        with pytest.raises(MissingError, match="can't be read"):
            Arrays(path=str(file))
    np.savez(tmp_path / "own.npz", train_inputs=TRAIN[0])
    with pytest.raises(MissingError, match="lacks train_labels, test_inputs, test_labels"):
        Arrays(path=str(tmp_path / "own.npz"))
