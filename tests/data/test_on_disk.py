"""Arrays and pictures that stay on disk hold what those in memory do."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch
from on_disk import same, write_arrays, write_pictures
from PIL import Image
from safetensors.numpy import save_file

from clplat.data import on_disk
from clplat.data.arrays import as_inputs
from clplat.data.decoded import Decoded, statistics
from clplat.data.on_disk import npy_file, remembered, safetensors_files, stays
from clplat.data.pictures import measured
from clplat.errors import MissingError, UserError
from clplat.streams.arrays import Arrays
from clplat.streams.images import Images

RNG = np.random.default_rng(0)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


ARRAYS = {
    "bytes, channels last": RNG.integers(0, 256, (30, 8, 9, 3), dtype=np.uint8),
    "bytes, grey": RNG.integers(0, 256, (30, 8, 9), dtype=np.uint8),
    "16 bits": RNG.integers(0, 65536, (30, 3, 8, 8), dtype=np.uint16),
    "doubles": RNG.normal(size=(30, 5)),
    "halves": RNG.normal(size=(30, 2, 3, 4)).astype(np.float16),
    "whole numbers": RNG.integers(-9, 9, (30, 5)),
    "truths": RNG.integers(0, 2, (30, 5)).astype(bool),
    "byte order": RNG.normal(size=(30, 5)).astype(">f4"),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_arrays_in_files_hold_what_arrays_in_memory_do(tmp_path, kind):
    folder = write_arrays(tmp_path / "a", ARRAYS[kind], np.arange(30) % 3)
    options = {"experiences": 3, "path": str(folder)}
    same(Arrays(**options, in_memory=False, workers=3), Arrays(**options))
    if kind != "byte order":  # which safetensors does not have
        save_file({f.stem: np.load(f) for f in folder.glob("*.npy")}, tmp_path / "a.safetensors")
        options["path"] = str(tmp_path / "a.safetensors")
        same(Arrays(**options, in_memory=False), Arrays(**options))


@pytest.mark.parametrize("options", [{}, {"size": 6}, {"grey": True}, {"normalize": "imagenet"}], ids=str)
def test_pictures_in_files_hold_what_pictures_in_memory_do(tmp_path, options):
    root = str(write_pictures(tmp_path / "own"))
    given = {"path": root, "experiences": 2} | options
    same(Images(**given, in_memory=False, workers=2), Images(**given))
    given["path"] = root + "/train"  # a part is held out
    same(Images(**given, in_memory=False), Images(**given))


def test_pictures_of_16_bits_and_turned_ones(tmp_path):
    for part in ("train", "test"):
        for c in "ab":
            (tmp_path / "own" / part / c).mkdir(parents=True)
            turned = Image.Exif()
            turned[0x0112] = 6
            deep = RNG.integers(0, 65536, (4, 6), dtype=np.uint16)
            Image.fromarray(deep).save(tmp_path / "own" / part / c / "deep.png")
            plain = Image.fromarray(RNG.integers(0, 256, (6, 4), dtype=np.uint8))
            plain.save(tmp_path / "own" / part / c / "turned.jpg", exif=turned)
    options = {"path": str(tmp_path / "own"), "experiences": 2, "grey": True}
    same(Images(**options, in_memory=False), on := Images(**options))
    assert on.input_shape == (1, 4, 6)
    bright = Images(**options, in_memory=False, scale=30000.0)
    assert torch.equal(bright[0].train.all()[0], Images(**options, scale=30000.0)[0].train.all()[0])
    assert bright.input_range[1] > 1


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1.0, 2], [np.nan, 3], [4, 5]] * 2), r"train_inputs hold nan in row 1 \(valid: finite 32-bit"),
        (np.array([[1e300, 2]] * 6), r"train_inputs hold inf in row 0"),
        (RNG.integers(0, 9, (6, 4, 4), dtype=np.uint8), r"stream\.scale: train_inputs are uint8 up to 8, not 255"),
        (RNG.integers(0, 9, (6, 5, 4, 3), dtype=np.int32), r"stream\.scale: .* whose range is not known"),
        (np.array([["a", "b"]] * 6), r"holds <U1 \(valid: numbers\)"),
    ],
    ids=str,
)
def test_refuses_what_it_refuses_in_memory(tmp_path, array, message):
    folder = write_arrays(tmp_path / "a", array, np.arange(6) % 2)
    with pytest.raises(UserError, match=message):
        Arrays(path=str(folder), in_memory=False, experiences=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "own.npz"}, r"stream\.in_memory: false, but own\.npz can't be read in parts"),
        ({"train": (np.eye(4), np.arange(4)), "test": (np.eye(4), np.arange(4))}, "given in Python are in memory"),
        ({"path": "a", "workers": 0}, r"stream\.workers: 0 is out of range \(valid: ≥ 1, or null\)"),
    ],
    ids=["npz", "python", "workers"],
)
def test_refuses_what_has_no_rows_on_disk(tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    write_arrays(tmp_path / "a", RNG.normal(size=(6, 5)), np.arange(6) % 2)
    np.savez("own.npz", **{f.stem: np.load(f) for f in (tmp_path / "a").glob("*.npy")})
    with pytest.raises(UserError, match=message):
        Arrays(**options, in_memory=False)


def test_images_refuse_options_without_a_meaning(tmp_path):
    with pytest.raises(UserError, match=r"stream\.in_memory: False has no meaning here .*with stream\.path"):
        Images(dataset="cifar10", data_root=str(tmp_path), in_memory=False)
    with pytest.raises(UserError, match=r"stream\.workers: 0 is out of range"):
        Images(path=str(tmp_path), workers=0)


def test_a_file_cut_short_is_named(tmp_path):
    folder = write_arrays(tmp_path / "a", RNG.normal(size=(30, 50)), np.arange(30) % 3)
    stream = Arrays(path=str(folder), in_memory=False, experiences=3)
    os.truncate(folder / "train_inputs.npy", 1000)
    with pytest.raises(MissingError, match=r"train_inputs\.npy can't be read \(it ends at row \d+ or after\)"):
        stream[2].train.all()
    with pytest.raises(MissingError, match=r"train_inputs\.npy can't be read"):
        Arrays(path=str(folder), in_memory=False, experiences=3)
    (tmp_path / "b.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    with pytest.raises(MissingError, match=r"b\.safetensors can't be read"):
        safetensors_files(tmp_path / "b.safetensors")


def test_a_picture_that_changes_or_goes_is_named(tmp_path):
    root = write_pictures(tmp_path / "own", train=2, test=1)
    stream = Images(path=str(root), in_memory=False, experiences=2)
    Image.new("RGB", (5, 5)).save(root / "train" / "0" / "0.jpg")
    with pytest.raises(MissingError, match=r"0/0\.jpg is \(3, 5, 5\) uint8, not \(3, 12, 12\) uint8"):
        stream[0].train.all()
    (root / "train" / "0" / "0.jpg").unlink()
    with pytest.raises(MissingError, match=r"0/0\.jpg is missing: put the picture there"):
        stream[0].train.all()
    (root / "train" / "0" / "0.jpg").write_bytes(b"no picture")
    with pytest.raises(MissingError, match=r"0/0\.jpg can't be read"):
        Images(path=str(root), in_memory=False, experiences=2)
    Image.new("RGB", (5, 5)).save(root / "train" / "0" / "0.jpg")
    with pytest.raises(
        UserError, match=r"stream\.size: images of 2 shapes, \(5, 5, 3\) to \(12, 12, 3\) \(give a size"
    ):
        Images(path=str(root), in_memory=False, experiences=2)


def test_what_was_found_out_is_kept_until_a_file_changes(tmp_path, cache):
    file, asked = tmp_path / "f", []
    file.write_text("one")

    def find():
        asked.append(1)
        return [len(asked), 0.1]

    assert [remembered("x", [file], [1], find) for _ in range(3)] == [[1, 0.1]] * 3
    assert remembered("x", [file], [2], find) == [2, 0.1]
    file.write_text("another")
    assert remembered("x", [file], [1], find) == [3, 0.1]
    for kept in cache.iterdir():
        kept.write_text("[")
    assert remembered("x", [file], [1], find) == [4, 0.1]
    cache.joinpath("gone").parent.chmod(0o500)
    assert remembered("x", [file], [1], find) == [4, 0.1]


def test_statistics_of_files_are_those_of_memory(tmp_path, cache, monkeypatch):
    options = {"path": str(write_pictures(tmp_path / "own")), "experiences": 2}
    on, off = Images(**options), Images(**options, in_memory=False)
    assert on.normalize == off.normalize == measured(on[0].train.inputs)
    monkeypatch.setattr(Decoded, "read", None)  # nothing is decoded again
    assert statistics(Images(**options, in_memory=False)[0].train.inputs) == on.normalize


@pytest.mark.parametrize(
    ("asked", "free", "stays_there"),
    [(None, 400, False), (None, 399, True), (True, 0, False), (False, 10**9, True)],
    ids=str,
)
def test_by_default_what_takes_more_than_a_quarter_of_the_free_memory_stays_on_disk(
    monkeypatch, asked, free, stays_there
):
    monkeypatch.setattr(on_disk, "free_memory", lambda: free)
    notes = []
    assert stays(asked, 100, "some pictures", notes) is stays_there
    assert [n.startswith("stream.in_memory: false, ") for n in notes] == [True] * stays_there


def test_free_memory_heeds_a_control_group(tmp_path, monkeypatch):
    monkeypatch.setattr(on_disk, "_CGROUP", tmp_path)
    free = on_disk.free_memory()
    assert free > 1000
    (tmp_path / "memory.current").write_text("100\n")
    (tmp_path / "memory.max").write_text("1100\n")
    assert on_disk.free_memory() == 1000
    (tmp_path / "memory.max").write_text("max\n")
    assert on_disk.free_memory() > 1000


def test_rows_must_lie_one_after_the_other(tmp_path):
    np.save(tmp_path / "a.npy", np.asfortranarray(RNG.normal(size=(6, 5))))
    with pytest.raises(
        UserError, match=r"a\.npy is stored in Fortran order \(valid: C order, or stream\.in_memory true"
    ):
        npy_file("a", tmp_path / "a.npy")
    assert npy_file("a", tmp_path / "a.npy", whole=True).shape == (6, 5)


def test_rows_of_a_file_one_by_one_and_in_runs(tmp_path):
    array = RNG.normal(size=(40, 3))
    np.save(tmp_path / "a.npy", array)
    file = npy_file("a", tmp_path / "a.npy")
    for rows in ([], [3], [3, 4, 5], [39, 0, 1, 1, 2, 7]):
        np.testing.assert_array_equal(file.rows(rows), array[rows])
    made, _, _ = as_inputs({"a": file})
    assert made["a"].span == (float(np.float32(array.min())), float(np.float32(array.max())))
