"""Pictures of every mode to pixels, and pictures in folders and listings."""

from __future__ import annotations

import csv
import struct
import zlib
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clplat.data.pictures import measured, pixels, read_picture, squeezed, stacked
from clplat.data.raw import Raw
from clplat.errors import MissingError, UserError
from clplat.preprocessing import Preprocessing
from clplat.streams.images import Images

RNG = np.random.default_rng(0)
COLOURS = RNG.integers(0, 256, (4, 6, 3), dtype=np.uint8)
GREYS = RNG.integers(0, 256, (4, 6), dtype=np.uint8)
DEEP = RNG.integers(0, 65536, (4, 6), dtype=np.uint16)


def saved(tmp_path: Path, image: Image.Image, name: str = "p.png", **how) -> Path:
    image.save(tmp_path / name, **how)
    return tmp_path / name


def test_colour_grey_and_one_bit(tmp_path):
    np.testing.assert_array_equal(read_picture(saved(tmp_path, Image.fromarray(COLOURS))), COLOURS)
    grey = read_picture(saved(tmp_path, Image.fromarray(GREYS)))
    np.testing.assert_array_equal(grey, np.repeat(GREYS[..., None], 3, -1))
    bits = read_picture(saved(tmp_path, Image.fromarray(GREYS > 99)), grey=True)
    np.testing.assert_array_equal(bits[..., 0], np.where(GREYS > 99, 255, 0))


def test_a_palette_gives_its_colours(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6), "P")
    image.putpalette(COLOURS.tobytes())
    np.testing.assert_array_equal(read_picture(saved(tmp_path, image)), COLOURS)
    seen = saved(tmp_path, image, "t.png", transparency=3)
    with pytest.raises(UserError, match=r"t\.png has transparent pixels \(valid: opaque ones"):
        read_picture(seen)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_an_alpha_channel_that_hides_nothing_is_left_out(tmp_path, mode):
    image = Image.fromarray(COLOURS if mode == "RGBA" else GREYS).convert(mode)
    expected = read_picture(saved(tmp_path, Image.fromarray(COLOURS if mode == "RGBA" else GREYS)))
    np.testing.assert_array_equal(read_picture(saved(tmp_path, image)), expected)
    image.putpixel((2, 1), (*[9] * (len(mode) - 1), 254))
    with pytest.raises(UserError, match="has transparent pixels"):
        read_picture(saved(tmp_path, image))


def test_sixteen_bits_keep_their_range(tmp_path):
    array = read_picture(saved(tmp_path, Image.fromarray(DEEP)), grey=True)
    np.testing.assert_array_equal(array[..., 0], DEEP)
    (images,) = stacked([array, read_picture(saved(tmp_path, Image.fromarray(GREYS)), grey=True)])
    np.testing.assert_allclose(images[0, 0], DEEP / 65535, rtol=1e-6)
    np.testing.assert_allclose(images[1, 0], GREYS / 255, rtol=1e-6)
    small = pixels(Image.fromarray(np.full((4, 4), 60000, np.uint16)), "it", fit=squeezed(2))
    np.testing.assert_array_equal(small, np.full((2, 2, 3), 60000))


def test_twelve_bits_in_sixteen_are_asked_about():
    """Divided by 65535 they would be dark; the deepest of all parts decides."""
    dim = DEEP[..., None] >> 4  # up to 4095
    with pytest.raises(UserError, match=r"stream\.scale: the pictures of 16 bits reach at most \d+, not 65535 .*4095"):
        stacked([dim], [dim // 2])
    np.testing.assert_allclose(stacked([dim], scale=4095)[0][0, 0], dim[..., 0] / 4095, rtol=1e-6)
    np.testing.assert_allclose(stacked([dim], [DEEP[..., None]])[0][0, 0], dim[..., 0] / 65535, rtol=1e-6)
    np.testing.assert_allclose(stacked([dim], scale=65535)[0][0, 0], dim[..., 0] / 65535, rtol=1e-6)
    for images, scale, message in (
        ([GREYS[..., None]], 4095, "no meaning for pictures of 8"),
        ([dim], 0, "out of range"),
    ):
        with pytest.raises(UserError, match=message):
            stacked(images, scale=scale)


@pytest.mark.parametrize(("white", "factor"), [(4095, 4095), (65535, 65535), (255, 65535)])
def test_a_loaded_learner_scales_them_as_its_stream_did(white, factor):
    dim = DEEP >> 4
    held = Raw(Preprocessing(shape=(1, 4, 6), white=white)).held(Image.fromarray(dim))
    np.testing.assert_allclose(held[0, 0], dim / factor, rtol=1e-6)


def test_a_tiff_says_its_bits(tmp_path):
    packed = bytes([0x00, 0x0F, 0xFF, 0x80, 0x00, 0x01])  # 0, 4095, 2048, 1 in 12 bits each
    tags = {256: 4, 257: 1, 258: 12, 259: 1, 262: 1, 273: 8, 277: 1, 278: 1, 279: len(packed)}
    fields = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(packed))
    (tmp_path / "t.tif").write_bytes(head + packed + struct.pack("<H", len(tags)) + fields + bytes(4))
    array = read_picture(tmp_path / "t.tif", grey=True)
    np.testing.assert_array_equal(array[0, :, 0], np.round(np.array([0, 4095, 2048, 1]) * 65535 / 4095))


def test_colours_of_sixteen_bits_that_use_twelve_are_refused(tmp_path):
    """Of them the upper eight are read: four would be left."""
    for shift, fault in (0, None), (4, r"t\.png has 16 bits a channel and uses the lower 12 alone"):
        wide = (np.full((2, 2, 3), 65535, np.uint16) >> shift).astype(">u2")
        rows = b"".join(b"\0" + row.tobytes() for row in wide)
        parts = (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")
        chunks = [struct.pack(">I", len(d)) + k + d + struct.pack(">I", zlib.crc32(k + d)) for k, d in parts]
        (tmp_path / "t.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
        with pytest.raises(UserError, match=fault) if fault else nullcontext():
            assert (read_picture(tmp_path / "t.png") == 255).all()


@pytest.mark.parametrize("values", [DEEP.astype(np.int32), DEEP.astype(np.float32)])
def test_pixels_of_unknown_range_are_refused(values):
    with pytest.raises(UserError, match=r"it has pixels of mode [IF], whose range"):
        pixels(Image.fromarray(values), "it")


def test_cmyk_is_converted_and_lab_refused():
    inks = Image.merge("CMYK", [Image.fromarray(255 - COLOURS[..., c]) for c in range(3)] + [Image.new("L", (6, 4))])
    np.testing.assert_array_equal(pixels(inks, "it"), COLOURS)
    with pytest.raises(UserError, match="it has pixels of mode LAB"):
        pixels(Image.new("LAB", (2, 2)), "it")


def test_turned_as_exif_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    path = saved(tmp_path, Image.fromarray(COLOURS), exif=exif)
    np.testing.assert_array_equal(read_picture(path), np.rot90(COLOURS, -1))


def test_several_frames_and_damaged_files_are_refused(tmp_path):
    frames = [Image.fromarray(GREYS), Image.fromarray(255 - GREYS)]
    path = saved(tmp_path, frames[0], "f.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"f\.gif has 2 frames"):
        read_picture(path)
    with pytest.raises(MissingError, match="is missing"):
        read_picture(tmp_path / "none.png")
    whole = saved(tmp_path, Image.fromarray(RNG.integers(0, 256, (64, 64, 3), dtype=np.uint8))).read_bytes()
    for cut in (whole[:50], whole[: len(whole) // 2], b"no picture"):
        (tmp_path / "p.png").write_bytes(cut)
        with pytest.raises(MissingError, match=r"p\.png can't be read"):
            read_picture(tmp_path / "p.png")


def test_measured_statistics():
    images = torch.from_numpy(RNG.integers(0, 256, (300, 3, 4, 4), dtype=np.uint8))
    for held, white in ((images, 255), (images.float() / 255, 1)):
        mean, std = measured(held)
        np.testing.assert_allclose(mean, (held.double() / white).mean((0, 2, 3)), rtol=1e-9)
        np.testing.assert_allclose(std, (held.double() / white).std((0, 2, 3), correction=0), rtol=1e-9)
    assert measured(torch.full((2, 1, 3, 3), 7, dtype=torch.uint8))[1] == [1.0]


# --- folders and listings ---------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path) -> Path:
    """train/ and test/ of classes 10, 9 and 2: 4 and 2 pictures of 6x4 pixels, all of one colour, the class's."""
    for part, count in (("train", 4), ("test", 2)):
        for c in (10, 9, 2):
            folder = tmp_path / "own" / part / str(c)
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (6, 4), (20 * c, i, 0)).save(folder / f"{i}.png")
    (tmp_path / "own" / ".DS_Store").touch()
    return tmp_path / "own"


def test_a_folder(root):
    stream = Images(path=str(root), experiences=3, normalize="none")
    assert stream.class_names == ("2", "9", "10")
    assert stream.input_shape == (3, 4, 6)
    assert [(len(e.train), len(e.test)) for e in stream] == [(4, 2)] * 3
    for e, c in zip(stream, (2, 9, 10), strict=True):
        assert (e.train.all()[0][:, 0] == 20 * c).all()
    assert stream.notes == ()
    assert Images(path=str(root), experiences=3, size=2, grey=True).input_shape == (1, 2, 2)
    assert Images(path="own", data_root=str(root.parent), experiences=3).num_classes == 3


def test_a_folder_without_a_test_part_is_split(root):
    stream = Images(path=str(root / "train"), experiences=3, test_share=0.25)
    assert [(len(e.train), len(e.test)) for e in stream] == [(3, 1)] * 3
    assert "3 of 12 pictures are held out, always the same ones" in stream.notes[0]
    again = Images(path=str(root / "train"), experiences=3, test_share=0.25, seed=5)
    assert torch.equal(stream[0].test.inputs, again[0].test.inputs)
    (root / "test").rename(root / "val")
    assert "val is the test part" in Images(path=str(root), experiences=3).notes[0]
    (root / "test").mkdir()
    (root / "test" / "9").mkdir()
    Image.new("RGB", (6, 4)).save(root / "test" / "9" / "a.png")
    assert "val in" in Images(path=str(root), experiences=3).notes[0]


def listing(root: Path, rows: list[dict[str, str]]) -> Path:
    with open(root / "list.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return root / "list.csv"


def rows_of(root: Path) -> list[dict[str, str]]:
    return [
        {"path": str(p.relative_to(root)), "label": f"c{p.parent.name}", "split": p.parts[-3], "domain": f"d{p.stem}"}
        for p in sorted(root.glob("*/*/*.png"))
    ]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_listing(root, suffix):
    path = listing(root, rows_of(root))
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        import pyarrow

        path = root / "list.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows_of(root)), path)
    stream = Images(path=str(path), scenario="domain", experiences=2)
    assert stream.class_names == ("c10", "c2", "c9")
    assert [e.name for e in stream] == ["d0", "d1"]
    assert [(len(e.train), len(e.test)) for e in stream] == [(3, 3)] * 2


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"label": ""}, UserError, r"row 2 of .*list\.csv has no label"),
        ({"split": "dev"}, UserError, r"row 2 of .*list\.csv has split 'dev' \(valid: .*train or test\)"),
        ({"path": "away.png"}, MissingError, r"away\.png is missing"),
    ],
    ids=str,
)
def test_a_listing_names_its_faulty_row(root, change, error, message):
    rows = rows_of(root)
    rows[1] |= change
    with pytest.raises(error, match=message):
        Images(path=str(listing(root, rows)))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"path": "nowhere"}, MissingError, r"no folder nowhere: put train/<class>"),
        ({"path": "no.csv"}, MissingError, r"no\.csv is missing"),
        ({"size": 0}, UserError, r"stream\.size: 0 is out of range"),
        ({"test_share": 1.0}, UserError, r"stream\.test_share: 1\.0 is out of range"),
        ({"dataset": "mnist"}, UserError, r"stream\.dataset: 'mnist' has no meaning here .*without stream\.path"),
        ({"path": None, "scale": 4095.0}, UserError, r"stream\.scale: 4095\.0 has no meaning here .*with stream\.path"),
        ({"scale": 4095.0}, UserError, r"stream\.scale: 4095\.0 has no meaning for pictures of 8 bits"),
        ({"labels": "coarse"}, UserError, r"stream\.labels: 'coarse' has no meaning here"),
        ({"path": None, "size": 8}, UserError, r"stream\.size: 8 has no meaning here .*with stream\.path"),
    ],
    ids=str,
)
def test_refuses(root, monkeypatch, options, error, message):
    monkeypatch.delenv("CLPLAT_DATA", raising=False)
    with pytest.raises(error, match=message):
        Images(**{"path": str(root), **options})


def test_what_is_no_picture_of_a_class_is_named(root):
    (root / "train" / "9" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt is no picture \(valid: <class>/<picture>"):
        Images(path=str(root))
    (root / "train" / "9" / "notes.txt").unlink()
    Image.new("RGB", (9, 9)).save(root / "train" / "9" / "z.png")
    with pytest.raises(
        UserError, match=r"stream\.size: images of 2 shapes, \(4, 6, 3\) to \(9, 9, 3\) \(give a size\)"
    ):
        Images(path=str(root))
