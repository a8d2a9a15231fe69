"""Sets of the package `datasets` that stay in their Arrow files hold what those in memory do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from on_disk import same, write_pictures
from PIL import Image

import clplat
from clplat.data import arrow, on_disk
from clplat.data.pictures import read_picture
from clplat.errors import MissingError, UserError
from clplat.streams.huggingface import HuggingFace

RNG = np.random.default_rng(0)
LABELS = {"label": [0, 1, 2] * 10}
CLASSES = datasets.ClassLabel(names=["ant", "bee", "cow"])


@pytest.fixture(autouse=True)
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("datasets.arrow_writer.config.DEFAULT_MAX_BATCH_SIZE", 7)  # several pieces a file
    datasets.disable_progress_bars()


def pictures(deep: bool = False) -> list[Image.Image]:
    top, dtype = (65536, np.uint16) if deep else (256, np.uint8)
    return [Image.fromarray(RNG.integers(0, top, (6, 8) if deep else (6, 8, 3), dtype=dtype)) for _ in range(30)]


def whole(inputs: Any, kind: Any = None) -> datasets.Dataset:
    features = datasets.Features({"inputs": kind, "label": CLASSES}) if kind else None
    return datasets.Dataset.from_dict({"inputs": inputs, **LABELS}, features=features)


def save(found: datasets.Dataset, root: Path) -> str:
    """As `save_to_disk` writes it, in two files a part; the second part is the first in another order."""
    other = found.select(range(len(found) - 1, -1, -1))
    datasets.DatasetDict(train=found, test=other).save_to_disk(str(root), num_shards={"train": 2, "test": 1})
    return str(root)


def both(dataset: str, **options: Any) -> tuple[HuggingFace, HuggingFace]:
    given = {"dataset": dataset, "experiences": 3} | options
    return HuggingFace(**given, in_memory=False, workers=2), HuggingFace(**given)


COLUMNS = {
    "numbers": (RNG.normal(size=30).tolist(), None),
    "lists": (RNG.normal(size=(30, 5)).tolist(), None),
    "32 bits": (RNG.normal(size=(30, 5)).tolist(), datasets.List(datasets.Value("float32"))),
    "whole numbers of 8 bits": (RNG.integers(0, 200, (30, 5)).tolist(), datasets.List(datasets.Value("uint8"))),
    "lists of one length": (RNG.normal(size=(30, 5)).tolist(), datasets.List(datasets.Value("float64"), length=5)),
    "large lists": (RNG.normal(size=(30, 5)).tolist(), datasets.LargeList(datasets.Value("float64"))),
    "arrays": (RNG.normal(size=(30, 4, 5)), datasets.Array2D((4, 5), "float32")),
    "lists of lists": (RNG.normal(size=(30, 2, 3, 4)).tolist(), None),
}


@pytest.mark.parametrize("kind", COLUMNS)
def test_numbers(tmp_path, kind):
    folder = save(whole(*COLUMNS[kind]), tmp_path / "saved")
    on, off = both(folder)
    same(on, off)
    assert on[0].train.inputs.dtype == off[0].train.inputs.dtype == torch.float32
    same(*both(folder, scale=3.0))


@pytest.mark.parametrize("options", [{}, {"size": 5}, {"grey": True}], ids=str)
def test_pictures(tmp_path, options):
    folder = save(whole(pictures(), datasets.Image()), tmp_path / "saved")
    on, off = both(folder, **options)
    same(on, off)
    assert on.class_names == ("ant", "bee", "cow")
    assert any("stream.in_memory: false, as asked: the inputs of" in note for note in on.notes)


def test_pictures_of_16_bits(tmp_path):
    same(*both(save(whole(pictures(deep=True), datasets.Image()), tmp_path / "saved"), grey=True, scale=60000.0))


def test_a_folder_of_parquet_files_and_one_of_pictures_that_are_files(tmp_path):
    found = whole(pictures(), datasets.Image())
    for part in ("train", "test"):
        (tmp_path / "parquet").mkdir(exist_ok=True)
        found.to_parquet(tmp_path / "parquet" / f"{part}.parquet")
    same(*both(str(tmp_path / "parquet")))
    write_pictures(tmp_path / "own", train=4, test=2)
    same(*both(str(tmp_path / "own")))


def test_a_share_of_the_only_split_is_held_out(tmp_path):
    for name, column in (("a", (RNG.normal(size=(30, 5)).tolist(), None)), ("b", (pictures(), datasets.Image()))):
        whole(*column).save_to_disk(str(tmp_path / name))
        on, off = both(str(tmp_path / name), test_share=0.3)
        same(on, off)
        assert [len(e.test) for e in on] == [3] * 3


def test_by_default_what_takes_too_much_stays_where_it_can(tmp_path, monkeypatch):
    folder = save(whole(RNG.normal(size=(30, 5)).tolist()), tmp_path / "saved")
    monkeypatch.setattr(on_disk, "free_memory", lambda: 4 * 60 * 5 * 4 - 1)
    assert not isinstance(HuggingFace(dataset=folder, experiences=3)[0].train.inputs, torch.Tensor)
    truths = save(whole(RNG.integers(0, 2, (30, 5)).astype(bool).tolist()), tmp_path / "truths")
    assert isinstance(HuggingFace(dataset=truths, experiences=3)[0].train.inputs, torch.Tensor)
    monkeypatch.setattr(on_disk, "free_memory", lambda: 4 * 60 * 5 * 4)
    assert isinstance(HuggingFace(dataset=folder, experiences=3)[0].train.inputs, torch.Tensor)


@pytest.mark.parametrize(
    ("column", "kind", "message"),
    [
        ([[1.0] * (1 + i % 2) for i in range(30)], None, "but column 'inputs' holds lists of several lengths"),
        ([[1.0]] * 29 + [None], None, "but column 'inputs' holds lists of several lengths"),
        ([1.0] * 29 + [None], None, "but column 'inputs' holds double and nothing"),
        ([True] * 30, None, r"but column 'inputs' holds bool \(valid: null\)"),
        (["a"] * 30, None, "but column 'inputs' holds string"),
        ([[1.0, float("nan")]] * 30, None, r"split 0 hold nan in row 0 \(valid: finite 32-bit"),
        ("pictures", datasets.Image(mode="L"), "but column 'inputs' is converted to the mode L"),
    ],
    ids=str,
)
def test_refuses_what_has_no_rows_on_disk(tmp_path, column, kind, message):
    folder = save(whole(pictures() if column == "pictures" else column, kind), tmp_path / "saved")
    with pytest.raises(UserError, match=message):
        HuggingFace(dataset=folder, experiences=3, in_memory=False)


def test_rows_without_a_picture_and_damaged_ones_are_named(tmp_path):
    broken = {"bytes": b"no picture", "path": None}
    folder = save(whole([*pictures()[:29], broken], datasets.Image()), tmp_path / "a")
    with pytest.raises(MissingError, match=r"\.arrow/row 29 can't be read"):
        HuggingFace(dataset=folder, experiences=3, in_memory=False)
    folder = save(whole([*pictures()[:29], None], datasets.Image()), tmp_path / "b")
    with pytest.raises(UserError, match="row 29 holds no picture"):
        HuggingFace(dataset=folder, experiences=3, in_memory=False)


def test_a_file_cut_short_is_named(tmp_path):
    folder = save(whole(RNG.normal(size=(30, 500)).tolist()), tmp_path / "saved")
    stream = HuggingFace(dataset=folder, experiences=3, in_memory=False)
    for file in Path(folder).glob("train/*.arrow"):
        file.write_bytes(file.read_bytes()[:3000])
    with pytest.raises(MissingError, match=r"data-0000.-of-00002\.arrow can't be read"):
        stream[0].train.all()


@pytest.mark.parametrize("column", ["pictures", "numbers"])
def test_the_streaming_form_is_kept_once(tmp_path, monkeypatch, column):
    values = (pictures(), datasets.Image()) if column == "pictures" else (RNG.normal(size=(30, 5)).tolist(), None)
    (tmp_path / "own").mkdir()
    found = whole(*values).add_column("idle", ["x" * 1000] * 30)
    for part in ("train", "test"):
        found.to_parquet(tmp_path / "own" / f"{part}.parquet")
    options = {"dataset": str(tmp_path / "own"), "experiences": 3, "streaming": True}
    same(HuggingFace(**options, in_memory=False), HuggingFace(**options | {"streaming": False}))
    files = sorted((tmp_path / "cache").glob("streamed-*.arrow"))
    assert len(files) == 2
    assert all(b"x" * 1000 not in file.read_bytes() for file in files)  # of other columns nothing is kept
    assert not list((tmp_path / "cache").glob(".*.part"))
    with monkeypatch.context() as patch:
        patch.setattr(datasets.IterableDataset, "iter", None)  # nothing is read from the set again
        same(HuggingFace(**options, in_memory=False), HuggingFace(**options))
    found.select(range(27)).to_parquet(tmp_path / "own" / "train.parquet")
    assert len(HuggingFace(**options)[0].train) == 9  # another set by that name


def test_a_set_that_breaks_off_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    whole(RNG.normal(size=(30, 5)).tolist()).to_parquet(tmp_path / "own" / "train.parquet")
    options = {"dataset": str(tmp_path / "own"), "experiences": 3, "streaming": True}
    original = datasets.table.embed_table_storage

    def broken(table):
        raise ConnectionError("the line is dead")

    monkeypatch.setattr(datasets.table, "embed_table_storage", broken)
    with pytest.raises(MissingError, match=r"stream\.streaming: own/default.*/train could not be put into .*line is"):
        HuggingFace(**options)
    assert not list((tmp_path / "cache").iterdir())
    monkeypatch.setattr(datasets.table, "embed_table_storage", original)
    HuggingFace(**options)


def test_a_folder_of_save_to_disk_has_no_streaming_form_and_no_configuration(tmp_path):
    folder = save(whole([[1.0]] * 30), tmp_path / "saved")
    with pytest.raises(UserError, match=r"stream\.streaming: true has no meaning for a folder of save_to_disk"):
        HuggingFace(dataset=folder, streaming=True)
    with pytest.raises(UserError, match=r"stream\.config: 'x' has no meaning for a folder of save_to_disk"):
        HuggingFace(dataset=folder, config="x")


def test_a_run_and_a_resumed_one_are_those_in_memory(tmp_path, cut):
    folder = save(whole(pictures(), datasets.Image()), tmp_path / "saved")
    stream = {"name": "huggingface", "dataset": folder, "experiences": 3, "in_memory": True}
    config = {"strategy": {"name": "er", "memory": 9, "replay_batch": 3}, "backbone": "mlp", "stream": stream,
              "loop": {"batch_size": 4, "max_epochs": 2}, "seed": 2, "tracking": {"enabled": False},
              "output": str(tmp_path / "runs")}  # fmt: skip
    straight = clplat.run(config, quiet=True)
    resumed = clplat.resume(cut({**config, "stream": {**stream, "in_memory": False}}, 4), quiet=True)
    assert straight.accuracy_matrix == resumed.accuracy_matrix
    a, b = (clplat.load(r.run_dir).state_dict() for r in (straight, resumed))
    assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


def test_pieces_that_begin_within_a_buffer(tmp_path, monkeypatch):
    numbers, faces = RNG.normal(size=(30, 5)), pictures()
    made = datasets.Dataset.from_dict(
        {"numbers": numbers.tolist(), "faces": faces},
        features=datasets.Features({"numbers": datasets.List(datasets.Value("float64")), "faces": datasets.Image()}),
    )
    made.save_to_disk(str(tmp_path / "saved"))
    files, whole_parts = sorted((tmp_path / "saved").glob("*.arrow")), arrow._parts

    def cut(files, column):
        for file, base, size, part in whole_parts(files, column):
            yield file, base, size, part.slice(1)

    monkeypatch.setattr(arrow, "_parts", cut)
    found = arrow.numbers(files, "numbers", "x")
    rest = found.shape[0]
    assert 0 < rest < 30
    np.testing.assert_array_equal(found.rows([rest - 1]), numbers[-1:])
    places = arrow.pictures(files, "faces")
    assert len(places) == rest
    np.testing.assert_array_equal(read_picture(places[-1]), np.asarray(faces[-1]))
