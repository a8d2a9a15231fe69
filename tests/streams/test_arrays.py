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
        ({"path": "own.pkl"}, r"unknown type \(valid: \.npz, \.safetensors, a folder of \.npy; nothing is unpickled\)"),
        (
            {"train": TRAIN, "test": (TEST[0][:, :3], TEST[1])},
            r"inputs differ: train_inputs \(5,\).*test_inputs \(3,\)",
        ),
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


def test_labels_with_gaps_and_of_any_size_are_numbered_densely() -> None:
    names = np.array([3, 5, 7, 17, 40, 10**12])
    labels = names[np.arange(40) % 6]
    order = [10**12, 3, 5, 7, 40, 17]
    stream = Arrays(train=(TRAIN[0], labels), test=(TRAIN[0], labels), experiences=3, class_order=order)
    assert stream.class_names == tuple(map(str, order))
    assert [e.classes for e in stream] == [(0, 1), (2, 3), (4, 5)]
    for e in stream:
        inputs, numbers = e.test.all()
        for i, number in enumerate(numbers.tolist()):
            row = int((torch.from_numpy(TRAIN[0]).float() == inputs[i]).all(1).nonzero())
            assert labels[row] == order[number]
    unsigned = names.astype(np.uint64)[np.arange(40) % 6]
    assert Arrays(train=(TRAIN[0], unsigned), test=(TRAIN[0], unsigned)).class_names[-1] == str(10**12)
    with pytest.raises(UserError, match=r"train labels hold 9223373036854775805 \(valid: 0 to 2"):
        Arrays(train=(TRAIN[0], unsigned + np.uint64(2**63 - 3)), test=(TRAIN[0], unsigned))


def test_images_in_either_layout_are_the_same_stream() -> None:
    images = RNG.integers(0, 256, (40, 8, 8, 3), dtype=np.uint8)
    one = Arrays(train=(images, TRAIN[1]), test=(images, TRAIN[1]), experiences=2)
    moved = images.transpose(0, 3, 1, 2)
    other = Arrays(train=(moved, TRAIN[1]), test=(moved, TRAIN[1]), experiences=2)
    assert one.input_shape == (3, 8, 8)
    assert torch.equal(one[1].train.all()[0], other[1].train.all()[0])


def test_domains_of_one_part_or_of_test_only_are_refused() -> None:
    train = (*TRAIN, np.arange(40) // 20)
    with pytest.raises(UserError, match=r"domains are given of the training samples only"):
        Arrays(train=train, test=TEST)
    with pytest.raises(UserError, match=r"test domains \[7\] are not among the training domains"):
        Arrays(train=train, test=(*TEST, np.full(12, 7)))


def test_arrays_of_a_file_that_are_not_used_are_said(tmp_path: Path) -> None:
    np.savez(tmp_path / "own.npz", **NAMED, valid_inputs=TEST[0])
    (note,) = Arrays(path=str(tmp_path / "own.npz"), experiences=2).notes
    assert note.startswith("stream.path: valid_inputs in ")
    assert Arrays(train=TRAIN, test=TEST, experiences=2).notes == ()


def test_test_samples_of_classes_that_no_domain_teaches_are_said() -> None:
    labels, domains = np.arange(40) % 4, np.arange(40) // 20
    labels[:20] = labels[:20] % 2  # the first domain teaches two classes
    train = TRAIN[0], labels, domains
    stream = Arrays(train=train, test=(TEST[0], TEST[1], np.zeros(12, int)), scenario="domain", experiences=1)
    assert stream.notes == (
        "stream.experiences: 6 test samples are left out: of classes that no training sample here has",
    )
