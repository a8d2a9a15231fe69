"""Image sets from a data root: reading, refusing, normalising, augmenting."""

from __future__ import annotations

import os
import sys
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from clplat.data.datasets import TORCHVISION, read_npz
from clplat.errors import MissingError, UserError
from clplat.streams.images import STATISTICS, Images, flip_crop

REAL = os.environ.get("CLPLAT_DATA")
needs_data = pytest.mark.skipif(not REAL, reason="CLPLAT_DATA is not set: no real image sets on this machine")


def write(root: Path, name: str, *, colour=True, splits=("train", "test"), classes=10, **extra: np.ndarray) -> Path:
    """A small set: 10 classes or fewer, 40 (20) images, bytes drawn by the length of its name."""
    folder = root / name
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(len(name))
    for split, each in zip(splits, (4, 2), strict=False):
        labels = np.arange(10 * each) % classes
        images = rng.integers(0, 256, (len(labels), 6, 5, 3)[: 4 if colour else 3], dtype=np.uint8)
        np.savez(
            folder / f"{split}.npz", images=images, labels=labels, **{k: v[: len(labels)] for k, v in extra.items()}
        )
    return folder


def test_reads_colour_and_grey(tmp_path: Path) -> None:
    folder = write(tmp_path, "cifar10")
    stream = Images(dataset="cifar10", data_root=str(tmp_path))
    stored = np.load(folder / "train.npz")["images"]
    assert torch.equal(stream[0].train.inputs, torch.from_numpy(stored).permute(0, 3, 1, 2))
    assert stream[0].train.inputs.is_contiguous()
    assert stream.input_shape == (3, 6, 5)
    assert stream.class_names[:2] == ("airplane", "automobile")
    write(tmp_path, "mnist", colour=False)
    assert Images(dataset="mnist", data_root=str(tmp_path)).input_shape == (1, 6, 5)


def test_data_root_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "cifar10")
    monkeypatch.setenv("CLPLAT_DATA", str(tmp_path))
    assert len(Images(dataset="cifar10")) == 5
    monkeypatch.setenv("CLPLAT_DATA", str(tmp_path / "elsewhere"))
    assert len(Images(dataset="cifar10", data_root=str(tmp_path))) == 5


def test_missing_data_root_and_missing_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CLPLAT_DATA", raising=False)
    with pytest.raises(MissingError, match=r"data_root: not set.*CLPLAT_DATA.*cifar10/train\.npz.*images uint8"):
        Images(dataset="cifar10")
    with pytest.raises(MissingError, match=rf"put {tmp_path}/pacs32/train\.npz there"):
        Images(dataset="pacs32", data_root=str(tmp_path))
    with pytest.raises(MissingError, match=r"train\.npz.*MNIST/raw.*--stream\.download true"):
        Images(dataset="mnist", data_root=str(tmp_path))
    write(tmp_path, "cifar100", splits=("train",))
    with pytest.raises(MissingError, match=r"cifar100/test\.npz there"):
        Images(dataset="cifar100", data_root=str(tmp_path))
    with pytest.raises(MissingError, match=r"omniglot/images_background_small1\.zip"):
        Images(dataset="omniglot", data_root=str(tmp_path))


@pytest.mark.parametrize("keep", [0, 10, 0.5, -30])
def test_truncated_archive(tmp_path: Path, keep: float) -> None:
    file = write(tmp_path, "cifar10") / "train.npz"
    whole = file.read_bytes()
    file.write_bytes(whole[: int(keep * len(whole)) if 0 < keep < 1 else int(keep)])
    with pytest.raises(MissingError, match=r"cifar10/train\.npz can't be read \(.*replace it by a whole \.npz"):
        Images(dataset="cifar10", data_root=str(tmp_path))


def test_damaged_bytes_are_noticed(tmp_path: Path) -> None:
    file = write(tmp_path, "cifar10") / "train.npz"
    damaged = bytearray(file.read_bytes())
    damaged[1000] ^= 255
    file.write_bytes(damaged)
    with pytest.raises(MissingError, match=r"can't be read"):
        Images(dataset="cifar10", data_root=str(tmp_path))


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "sprung"),))

    file = write(tmp_path, "cifar10") / "train.npz"
    np.savez(file, images=np.array([Trap()] * 3, dtype=object), labels=np.arange(3))
    with pytest.raises(MissingError, match=r"can't be read \(.*allow_pickle=False"):
        Images(dataset="cifar10", data_root=str(tmp_path))
    np.save(tmp_path / "one.npy", np.array([Trap()], dtype=object), allow_pickle=True)
    (tmp_path / "one.npy").rename(tmp_path / "one.npz")
    with pytest.raises(MissingError, match=r"can't be read"):
        read_npz(tmp_path / "one.npz")
    assert not (tmp_path / "sprung").exists()


def test_wrong_arrays(tmp_path: Path) -> None:
    file = write(tmp_path, "cifar10") / "train.npz"
    np.savez(file, images=np.zeros((3, 4, 4), np.uint8))
    with pytest.raises(MissingError, match=r"lacks labels \(it has: images\)"):
        Images(dataset="cifar10", data_root=str(tmp_path))
    np.savez(file, images=np.zeros((3, 4, 4), np.float32), labels=np.arange(3))
    with pytest.raises(MissingError, match=r"has images float32 \(3, 4, 4\)"):
        Images(dataset="cifar10", data_root=str(tmp_path))
    np.savez(file, images=np.zeros((3, 4, 4), np.uint8), labels=np.arange(2))
    with pytest.raises(MissingError, match=r"labels int64 \(2,\)"):
        Images(dataset="cifar10", data_root=str(tmp_path))


def test_normalisation(tmp_path: Path) -> None:
    write(tmp_path, "cifar10")
    for choice, (mean, std) in {"dataset": STATISTICS["cifar10"], "none": ([0, 0, 0], [1, 1, 1])}.items():
        stream = Images(dataset="cifar10", data_root=str(tmp_path), normalize=choice)
        inputs = stream[0].train.all()[0]
        expected = (inputs / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(stream.prepare(inputs, training=True), expected)
    write(tmp_path, "mnist", colour=False)
    with pytest.raises(UserError, match="'imagenet' needs three channels"):
        Images(dataset="mnist", data_root=str(tmp_path), normalize="imagenet")


def test_coarse_labels(tmp_path: Path) -> None:
    write(tmp_path, "cifar100", coarse=np.arange(40) % 10 // 5)
    stream = Images(dataset="cifar100", data_root=str(tmp_path), labels="coarse", experiences=2)
    assert stream.num_classes == 2
    assert stream[1].train.rows.tolist() == [i for i in range(40) if i % 10 >= 5]
    write(tmp_path, "cifar10")
    with pytest.raises(UserError, match="'coarse' is not known for cifar10"):
        Images(dataset="cifar10", data_root=str(tmp_path), labels="coarse")


def test_real_domains_have_their_names(tmp_path: Path) -> None:
    write(tmp_path, "pacs32", domain=np.arange(40) % 4, classes=7)
    stream = Images(dataset="pacs32", data_root=str(tmp_path), scenario="domain", experiences=4)
    assert [e.name for e in stream] == ["photo", "art_painting", "cartoon", "sketch"]
    assert [e.train.rows.tolist() for e in stream] == [list(range(d, 40, 4)) for d in range(4)]


def test_notmnist_of_one_part_is_split(tmp_path: Path) -> None:
    write(tmp_path, "notmnist", colour=False, splits=("test",))
    stream = Images(dataset="notmnist", data_root=str(tmp_path))
    assert (len(stream[0].train.inputs), len(stream[0].test.inputs)) == (32, 8)


def test_a_list_unites_sets_each_with_its_own_classes(tmp_path: Path) -> None:
    stored = [np.load(write(tmp_path, name, colour=False) / "train.npz")["images"] for name in ("mnist", "notmnist")]
    stream = Images(dataset=["mnist", "notmnist"], data_root=str(tmp_path), experiences=2)
    assert stream.class_names == (*(f"mnist_{i}" for i in range(10)), *"ABCDEFGHIJ")
    assert [e.classes for e in stream] == [tuple(range(10)), tuple(range(10, 20))]
    assert [len(e.test) for e in stream] == [20, 20]
    for e, images in zip(stream, stored, strict=True):
        inputs, labels = e.train.all()
        assert torch.equal(inputs[:, 0], torch.from_numpy(images))
        assert (labels - e.classes[0]).tolist() == [i % 10 for i in range(40)]


def test_united_sets_are_normalised_as_one_of_equal_parts(tmp_path: Path) -> None:
    for name in ("mnist", "notmnist"):
        write(tmp_path, name, colour=False)
    stream = Images(dataset=["mnist", "notmnist"], data_root=str(tmp_path))
    parts = [np.random.default_rng(0).standard_normal(1000) for _ in range(2)]
    one, other = (  # any two samples of one size with these moments
        (p - p.mean()) / p.std() * STATISTICS[n][1][0] + STATISTICS[n][0][0]
        for p, n in zip(parts, ("mnist", "notmnist"), strict=True)
    )
    both = torch.from_numpy(np.concatenate([one, other]))
    prepared = stream.prepare(both.float().view(1, 1, 1, -1), training=False)
    assert abs(prepared.mean()) < 1e-5
    assert abs(prepared.std(correction=0) - 1) < 1e-5


@pytest.mark.parametrize(
    ("dataset", "fault"),
    [
        (["mnist", "cifar10"], r"images are .*\(1, 6, 5\).*\(3, 6, 5\).*valid: sets of images of one shape"),
        (["mnist", "mnist"], "names a set twice"),
        ([], "is empty"),
        (["mnist", "mnistt"], "'mnistt' is unknown"),
    ],
)
def test_sets_that_can_not_be_united(tmp_path: Path, dataset: list[str], fault: str) -> None:
    write(tmp_path, "mnist", colour=False)
    write(tmp_path, "cifar10")
    with pytest.raises(UserError, match=f"stream.dataset: .*{fault}"):
        Images(dataset=dataset, data_root=str(tmp_path))


def test_unknown_options(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        Images(dataset="cifar11", augment="flip", data_root=str(tmp_path))
    assert [f.split(":")[0] for f in caught.value.faults] == ["stream.dataset", "stream.augment"]
    assert "valid: cifar10, cifar100" in caught.value.faults[0]


def test_omniglot_zips(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "omniglot").mkdir()
    for number, alphabet in ((1, "Greek"), (2, "Latin")):
        with zipfile.ZipFile(tmp_path / f"omniglot/images_background_small{number}.zip", "w") as archive:
            for character in (1, 2):
                for drawer in range(1, 21):
                    ink = np.ones((105, 105), dtype=bool)
                    ink[: 5 * drawer] = False
                    folder = f"images_background_small{number}/{alphabet}/character{character:02}"
                    with archive.open(f"{folder}/0001_{drawer:02}.png", "w") as file:
                        Image.fromarray(ink).save(file, "png")
    stream = Images(dataset="omniglot", data_root=str(tmp_path), experiences=2)
    assert (stream.num_classes, stream.input_shape) == (4, (1, 28, 28))
    assert [len(e.train) for e in stream] == [30, 30]
    assert [len(e.test) for e in stream] == [10, 10]
    assert (
        stream[0].train.batch(torch.tensor([14]))[0].float().mean()
        > stream[0].train.batch(torch.tensor([0]))[0].float().mean()
    )
    (tmp_path / "omniglot/images_background_small2.zip").write_bytes(b"PK")
    with pytest.raises(MissingError, match=r"small2\.zip can't be read"):
        Images(dataset="omniglot", data_root=str(tmp_path), experiences=2)


# --- torchvision's files ----------------------------------------------------------------------------------------------


def fake_torchvision(monkeypatch: pytest.MonkeyPatch, dataset: type) -> None:
    package, module = types.ModuleType("torchvision"), types.ModuleType("torchvision.datasets")
    package.datasets = module  # type: ignore[attr-defined]
    for cls, _ in TORCHVISION.values():
        setattr(module, cls, dataset)
    monkeypatch.setitem(sys.modules, "torchvision", package)
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "svhn"])
def test_torchvision_files_are_read_and_fetched_only_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    asked = []

    class Fake:
        def __init__(self, root, download, train=None, split=None) -> None:
            asked.append((root, download, train if split is None else split))
            count = 20
            self.targets = self.labels = np.arange(count) % 10
            shape = {"mnist": (count, 4, 4), "cifar10": (count, 4, 4, 3), "svhn": (count, 3, 4, 4)}[name]
            self.data = np.zeros(shape, np.uint8)

    fake_torchvision(monkeypatch, Fake)
    with pytest.raises(MissingError):
        Images(dataset=name, data_root=str(tmp_path))
    assert asked == []
    stream = Images(dataset=name, data_root=str(tmp_path), download=True)
    which = ["train", "test"] if name == "svhn" else [True, False]
    assert asked == [(str(tmp_path), True, w) for w in which]
    assert stream.input_shape == ((1 if name == "mnist" else 3), 4, 4)
    marker = tmp_path / TORCHVISION[name][1]
    marker.parent.mkdir(exist_ok=True)
    marker.touch()
    Images(dataset=name, data_root=str(tmp_path))
    assert asked[2:] == [(str(tmp_path), False, w) for w in which]


def test_a_failed_download_is_missing_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fails:
        def __init__(self, **options) -> None:
            raise RuntimeError("no network")

    fake_torchvision(monkeypatch, Fails)
    with pytest.raises(MissingError, match=r"mnist train could not be had from .*MNIST/raw \(no network\)"):
        Images(dataset="mnist", data_root=str(tmp_path), download=True)


# --- augmentation -----------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=25)
@given(
    count=st.integers(1, 5),
    channels=st.integers(1, 3),
    height=st.integers(2, 9),
    width=st.integers(2, 9),
    seed=st.integers(0, 99),
)
def test_flip_crop_is_a_shifted_and_mirrored_window(
    count: int, channels: int, height: int, width: int, seed: int
) -> None:
    torch.manual_seed(seed)
    images = torch.rand(count, channels, height, width) + 1
    cut = flip_crop(images, padding=2)
    assert cut.shape == images.shape
    padded = torch.nn.functional.pad(images, (2, 2, 2, 2))
    for i in range(count):
        windows = [padded[i, :, y : y + height, x : x + width] for y in range(5) for x in range(5)]
        assert any(torch.equal(cut[i], w) or torch.equal(cut[i], w.flip(-1)) for w in windows)


def test_flip_crop_varies_within_a_batch_and_draws_from_torch_only() -> None:
    images = torch.arange(64.0).view(1, 1, 8, 8).expand(40, -1, -1, -1) + 1
    torch.manual_seed(0)
    one = flip_crop(images)
    torch.manual_seed(0)
    assert torch.equal(one, flip_crop(images))
    assert not torch.equal(one, flip_crop(images))
    assert len({tuple(c.flatten().tolist()) for c in one}) > 20


def test_only_training_batches_are_augmented(tmp_path: Path) -> None:
    write(tmp_path, "cifar10")
    stream = Images(dataset="cifar10", data_root=str(tmp_path), augment="flip_crop")
    inputs = stream[0].train.all()[0]
    plain = stream.prepare(inputs, training=False)
    assert torch.equal(plain, stream.prepare(inputs, training=False))
    assert not torch.equal(plain, stream.prepare(inputs, training=True))


# --- real data --------------------------------------------------------------------------------------------------------


@needs_data
@pytest.mark.parametrize("name", ["cifar10", "cifar100", "mnist", "fashion_mnist", "notmnist", "omniglot", "pacs32"])
def test_real_sets_have_the_statistics_they_are_normalised_by(name: str) -> None:
    stream = Images(dataset=name, data_root=REAL)
    inputs = stream[0].train.inputs
    prepared = stream.prepare(inputs[:: max(1, len(inputs) // 5000)], training=False)
    assert prepared.mean().abs() < 0.06
    assert abs(prepared.std() - 1) < 0.06
    assert stream.num_classes == {"cifar100": 100, "omniglot": 242, "pacs32": 7}.get(name, 10)


def test_labels_that_the_set_does_not_have_are_refused(tmp_path: Path) -> None:
    folder = write(tmp_path, "cifar10")
    held = dict(np.load(folder / "train.npz"))
    for label in (10, 10**12, -1):
        held["labels"][7] = label
        np.savez(folder / "train.npz", **held)
        with pytest.raises(MissingError, match=r"replace it by one whose labels are those of cifar10 \(0 to 9\)"):
            Images(dataset="cifar10", data_root=str(tmp_path))


def test_channels_first_are_told_apart(tmp_path: Path) -> None:
    folder = write(tmp_path, "cifar10")
    whole = Images(dataset="cifar10", data_root=str(tmp_path))[0].train.inputs
    for part in ("train", "test"):
        held = dict(np.load(folder / f"{part}.npz"))
        np.savez(folder / f"{part}.npz", **held | {"images": held["images"].transpose(0, 3, 1, 2)})
    assert torch.equal(Images(dataset="cifar10", data_root=str(tmp_path))[0].train.inputs, whole)


def test_coarse_labels_have_no_fine_names(tmp_path: Path) -> None:
    write(tmp_path, "cifar10", coarse=np.arange(40) % 10 // 5)
    assert Images(dataset="cifar10", data_root=str(tmp_path), labels="coarse", experiences=2).class_names == ("0", "1")
