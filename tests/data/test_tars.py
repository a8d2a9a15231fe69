"""Pictures in tar files hold what those in folders do; what is unclear in a tar file is refused by name."""

from __future__ import annotations

import gzip
import os
import tarfile

import pytest
import torch
from on_disk import add, write_pictures, write_tars

from clplat.errors import MissingError, UserError
from clplat.streams.images import Images


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def root(tmp_path):
    return write_tars(tmp_path / "tars", write_pictures(tmp_path / "own", train=4, test=2))


@pytest.mark.parametrize("in_memory", [True, False])
def test_tars_hold_what_folders_do(tmp_path, root, in_memory):
    tars = Images(path=str(root), experiences=2, in_memory=in_memory)
    folders = Images(path=str(tmp_path / "own"), experiences=2)
    assert (tars.class_names, tars.normalize) == (folders.class_names, folders.normalize)
    for e, f in zip(tars, folders, strict=True):
        for a, b in ((e.train, f.train), (e.test, f.test)):
            (x, y), (z, w) = a.all(), b.all()
            # Every other picture is in the other file: compared as sets of (class, content).
            assert sorted((c, p.flatten().tolist()) for c, p in zip(y.tolist(), x, strict=True)) == sorted(
                (c, p.flatten().tolist()) for c, p in zip(w.tolist(), z, strict=True)
            )


def test_a_test_part_is_cut_from_tars_alone(root):
    stream = Images(path=str(root / "train"), experiences=2, test_share=0.25, in_memory=False)
    assert [(len(e.train), len(e.test)) for e in stream] == [(6, 2)] * 2
    again = Images(path=str(root / "train"), experiences=2, test_share=0.25)
    assert torch.equal(stream[1].test.all()[0], again[1].test.all()[0])


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("x.jpg", b"1")], r"'x' of .*2\.tar has no class \(valid: a member x\.cls that holds it\)"),
        ([("x.jpg", b"1"), ("x.png", b"1"), ("x.cls", b"0")], r"2\.tar has two pictures of 'x' \(valid: one a sample"),
    ],
    ids=["no class", "two pictures"],
)
def test_refuses(root, members, message):
    with tarfile.open(root / "train" / "2.tar", "w") as archive:
        for name, content in members:
            add(archive, name, content)
    with pytest.raises(UserError, match=message):
        Images(path=str(root))


def test_members_without_a_use_are_said(root):
    with tarfile.open(root / "train" / "2.tar", "w") as archive:
        add(archive, "x.json", b"{}")
    assert any("members .json of the tar files in" in note for note in Images(path=str(root), experiences=2).notes)


def test_damaged_and_compressed_files_are_named(root):
    file = root / "train" / "0.tar"
    stream = Images(path=str(root), experiences=2, in_memory=False)
    whole = file.read_bytes()
    os.truncate(file, 600)
    with pytest.raises(MissingError, match=r"0\.tar/s/\d-\d\.jpg can't be read"):
        stream[0].train.all()
    file.write_bytes(gzip.compress(whole))
    with pytest.raises(
        MissingError, match=r"0\.tar can't be read .*replace it by a whole \.tar file that is not compr"
    ):
        Images(path=str(root))


def test_a_tar_cut_within_a_picture_is_refused(root):
    file = root / "train" / "0.tar"
    os.truncate(file, 600)
    with pytest.raises((MissingError, UserError), match=r"0\.tar"):
        Images(path=str(root), in_memory=False)
