"""Streams of corrupted images: their order, their samples, the published files, and what must not reach a learner."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from clplat import Kind
from clplat.data.corruptions.constants import EXTRA, NAMES, ORDERS, STANDARD
from clplat.data.corruptions.order import correlated
from clplat.errors import MissingError, UserError
from clplat.run.evaluation import Evaluator
from clplat.streams.corruptions import Corruptions

RAMP = [1, 2, 3, 4, 5, 4, 3, 2, 1]


def make(**options) -> Corruptions:
    return Corruptions(**{"samples": 20, "source": False, **options})


def visited(stream: Corruptions) -> list[tuple[str, int, int]]:
    return [(e.domain, e.severity, e.round) for e in stream if e.kind is Kind.ADAPT]


def images(stream: Corruptions, index: int = 0) -> torch.Tensor:
    return stream[index].train.all()[0]


def test_continual_is_the_standard_order_once():
    assert visited(make()) == [(name, 5, 0) for name in STANDARD]
    assert visited(make(severity=3)) == [(name, 3, 0) for name in STANDARD]
    assert visited(make(corruptions="extra")) == [(name, 5, 0) for name in EXTRA]
    assert visited(make(corruptions=["fog", "snow"])) == [("fog", 5, 0), ("snow", 5, 0)]


def test_rounds_come_back_to_the_same_images_in_another_order():
    stream = make(order="recurring", corruptions=["fog", "shot_noise"])
    assert visited(stream) == [(name, 5, r) for r in range(10) for name in ("fog", "shot_noise")]
    assert len({e.name for e in stream}) == 20
    first, again = stream[0].train, stream[2].train
    assert first.rows.tolist() != again.rows.tolist()
    assert sorted(first.rows.tolist()) == sorted(again.rows.tolist())
    place = first.rows.argsort(), again.rows.argsort()
    assert torch.equal(first.batch(place[0])[0], again.batch(place[1])[0])
    assert len(make(order="recurring", rounds=3)) == 45


@pytest.mark.parametrize("number", range(10))
def test_published_orders_are_permutations_of_the_standard_ones(number):
    assert sorted(ORDERS[number]) == sorted(STANDARD)
    assert [e.domain for e in make(published_order=number)] == list(ORDERS[number])


def test_published_orders_spot_checked_against_the_authors():
    assert ORDERS[0][:3] == ("brightness", "pixelate", "gaussian_noise")
    assert ORDERS[5][-1] == "impulse_noise"
    assert ORDERS[9][0] == "contrast"
    assert len(set(ORDERS)) == 10


def test_gradual_rises_and_falls():
    cotta = visited(make(order="gradual"))
    assert [s for _, s, _ in cotta] == RAMP[4:] + 14 * RAMP
    assert len(cotta) == 131
    assert [name for name, _ in itertools.groupby(n for n, _, _ in cotta)] == list(STANDARD)
    full = make(order="gradual_full")
    assert [s for _, s, _ in visited(full)] == 15 * RAMP
    assert len({e.name for e in full}) == 135


def test_mixed_holds_every_image_under_every_corruption():
    stream = make(order="mixed", corruptions=["fog", "contrast", "pixelate"])
    data = stream[0].train
    assert len(stream) == 1
    assert len(data) == 60
    parts = data.parts(data.rows)
    assert torch.bincount(parts).tolist() == [20, 20, 20]
    assert (parts[:20].unique()).tolist() == [0, 1, 2]  # shuffled, not one after the other
    assert data.part_names() == ("fog", "contrast", "pixelate")
    alone = make(corruptions=["contrast"])[0].train
    mine = (parts == 1).nonzero().squeeze(1)
    mine = mine[data.rows[mine].argsort()]
    assert torch.equal(data.batch(mine)[0], alone.batch(alone.rows.argsort())[0])


def runs(labels: torch.Tensor) -> float:
    return float((labels[1:] == labels[:-1]).float().mean())


def test_labels_come_in_runs():
    plain, sorted_ = (
        make(samples=None, **o)[0].train.targets() for o in ({}, {"order": "correlated", "concentration": 0})
    )
    tight, loose = (make(samples=None, order="correlated", concentration=c)[0].train.targets() for c in (0.1, 100))
    assert runs(plain) < 0.2
    assert len(list(itertools.groupby(sorted_.tolist()))) == 10
    assert runs(tight) > runs(loose) > runs(plain)
    assert sorted(tight.tolist()) == sorted(plain.tolist())
    mixed = make(samples=None, order="mixed_correlated", corruptions=["fog", "snow"])[0].train
    assert runs(mixed.targets()) > 0.5
    assert 0.2 < runs(mixed.parts(mixed.rows)) < 0.8


def test_dirichlet_shares_are_those_of_a_draw():
    """With a large concentration each slot holds an equal share of each class."""
    labels = np.repeat(np.arange(4), 100)
    order = correlated(labels, 1e6, np.random.default_rng(0))
    assert sorted(order.tolist()) == list(range(400))
    for slot in np.split(labels[order], 4):
        assert (np.bincount(slot) == 25).all()


def test_a_seed_is_a_stream_and_another_one_another():
    first, same, other = (make(seed=s, corruptions=["gaussian_noise"])[0].train for s in (1, 1, 2))
    assert first.rows.tolist() == same.rows.tolist() != other.rows.tolist()
    assert torch.equal(first.all()[0], same.all()[0])
    # the same image has other noise
    everything = {s: make(seed=s, samples=None, shuffle=False, corruptions=["gaussian_noise"])[0].train for s in (1, 2)}
    assert (everything[1].all()[0] != everything[2].all()[0]).float().mean() > 0.5


def test_samples_are_the_same_ones_for_every_corruption():
    stream = make(corruptions=["fog", "snow"], shuffle=False)
    assert stream[0].train.rows.tolist() == stream[1].train.rows.tolist() == sorted(stream[0].train.rows.tolist())
    assert len(stream[0].train) == 20


def test_batches_are_the_images_whatever_their_size():
    data = make(corruptions=["glass_blur"])[0].train
    whole = data.all()[0]
    one_by_one = torch.cat([data.batch(torch.tensor([i]))[0] for i in range(len(data))])
    assert torch.equal(whole, one_by_one)
    empty, labels = data.batch(torch.empty(0, dtype=torch.int64))
    assert empty.shape == (0, 1, 8, 8)
    assert labels is not None
    assert len(labels) == 0


def test_the_source_comes_first_if_asked_for_and_its_clean_test_set_is_scored():
    stream = make(source=True)
    assert stream[0].kind is Kind.LEARN
    assert len(stream[0].train) == 1437
    assert len(stream[0].test) == 360
    assert all(e.test is None for e in stream.experiences[1:])
    assert [e.index for e in stream] == list(range(16))
    alone = make(clean=50)
    assert len(alone[0].test) == 50
    assert type(alone[0].test.inputs) is torch.Tensor
    assert all(e.test is None for e in alone.experiences[1:])
    assert make(clean=0)[0].test is None


def test_inputs_stay_in_zero_to_one_and_all_classes_are_known():
    stream = make(corruptions=["brightness"])
    prepared = stream.prepare(images(stream), False)
    assert prepared.min() >= 0
    assert prepared.max() <= 1
    assert stream[0].classes == tuple(range(10))
    assert stream.num_classes == 10


def test_what_a_strategy_sees_has_no_labels_and_no_test_set():
    seen = make()[0].seen()
    assert seen.test is None
    assert seen.train.labels is None
    assert seen.train.batch(torch.arange(3))[1] is None
    with pytest.raises(ValueError, match="no labels"):
        seen.train.targets()


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"severity": 6}, "stream.severity: 6"),
        ({"severity": 0}, "stream.severity: 0"),
        ({"corruptions": ["fig"]}, "stream.corruptions: "),
        ({"corruptions": "most"}, "stream.corruptions: 'most'"),
        ({"corruptions": []}, "stream.corruptions: "),
        ({"corruptions": ["fog", "fog"]}, "stream.corruptions: "),
        ({"published_order": 10}, "stream.published_order: 10"),
        ({"published_order": 1, "corruptions": "all"}, "stream.published_order: it orders"),
        ({"order": "random"}, "stream.order: 'random'"),
        ({"rounds": 0}, "stream.rounds: 0"),
        ({"samples": 0}, "stream.samples: 0"),
        ({"clean": -1}, "stream.clean: -1"),
        ({"concentration": -0.1}, "stream.concentration: -0.1"),
        ({"seed": -1}, "stream.seed: -1"),
        ({"published": True}, "stream.dataset: 'digits'"),
        ({"dataset": "imagenet"}, "stream.dataset: imagenet"),
        ({"dataset": "imagenet", "published": True, "source": True}, "stream.source: imagenet"),
    ],
)
def test_refuses(options, key):
    with pytest.raises(UserError) as error:
        make(**options)
    assert any(line.startswith(key) for line in error.value.args), error.value.args


# --- the published files ----------------------------------------------------------------------------------------------


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    """CIFAR-10-C with 20 test images; the pixels of a file tell its corruption, severity and image."""
    folder = tmp_path / "CIFAR-10-C"
    folder.mkdir()
    np.save(folder / "labels.npy", np.tile(np.arange(20) % 10, 5).astype(np.uint8))
    for number, name in enumerate(STANDARD):
        pixels = np.zeros((100, 32, 32, 3), np.uint8)
        pixels[..., 0], pixels[..., 1] = number, np.repeat(np.arange(1, 6), 20)[:, None, None]
        pixels[..., 2] = np.tile(np.arange(20), 5)[:, None, None]
        np.save(folder / f"{name}.npy", pixels)
    return tmp_path


def test_cifar_files_are_read_by_corruption_and_severity(cifar):
    stream = make(dataset="cifar10", data_root=str(cifar), published=True, severity=4, samples=None)
    assert stream.input_shape == (3, 32, 32)
    for number, experience in enumerate(stream):
        inputs, labels = experience.train.all()
        assert inputs.shape == (20, 3, 32, 32)
        assert (inputs[:, 0] == number).all()
        assert (inputs[:, 1] == 4).all()
        assert (inputs[:, 2, 0, 0] % 10 == labels).all()
        assert sorted(inputs[:, 2, 0, 0].tolist()) == list(range(20))
    assert stream[0].test is None  # there are no clean images under this root


def test_cifar_files_in_the_other_orders(cifar):
    options = {"dataset": "cifar10", "data_root": str(cifar), "published": True, "samples": 5}
    gradual = make(order="gradual", **options)
    for experience in gradual:
        inputs, labels = experience.train.all()
        assert (inputs[:, 1] == experience.severity).all()
        assert (inputs[:, 2, 0, 0] % 10 == labels).all()
    mixed = make(order="mixed", **options)[0].train
    inputs, _ = mixed.all()
    assert torch.equal(inputs[:, 0, 0, 0].long(), mixed.parts(mixed.rows))


def test_cifar_files_that_are_missing_or_damaged(cifar):
    options = {"dataset": "cifar10", "data_root": str(cifar), "published": True}
    np.save(cifar / "CIFAR-10-C" / "fog.npy", np.zeros((7, 32, 32, 3), np.uint8))
    with pytest.raises(MissingError, match=r"fog.npy holds uint8"):
        make(**options)
    (cifar / "CIFAR-10-C" / "fog.npy").write_bytes(b"nothing")
    with pytest.raises(MissingError, match=r"fog.npy can't be read"):
        make(**options)
    (cifar / "CIFAR-10-C" / "fog.npy").unlink()
    with pytest.raises(MissingError, match=r"fog.npy is missing: put it there, as Zenodo 2535967"):
        make(**options)
    with pytest.raises(MissingError, match="CIFAR-100-C"):
        make(dataset="cifar100", data_root=str(cifar), published=True)


def test_imagenet_files(tmp_path):
    from PIL import Image

    root = tmp_path / "ImageNet-C"
    for name, (k, wnid) in itertools.product(("fog", "snow"), enumerate(("n01", "n02", "n03"))):
        folder = root / name / "5" / wnid
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (224, 224), (40 * k, 100 * i, 200)).save(folder / f"val_{i}.JPEG", quality=95)
            clean = tmp_path / "imagenet" / "val" / wnid
            clean.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (300, 260), (40 * k, 100 * i, 0)).save(clean / f"val_{i}.JPEG", quality=95)
    options = {"dataset": "imagenet", "data_root": str(tmp_path), "published": True, "corruptions": ["fog", "snow"]}
    stream = make(samples=None, **options)
    assert stream.num_classes == 3
    assert stream.input_shape == (3, 224, 224)
    inputs, labels = stream[1].train.all()
    assert inputs.shape == (6, 3, 224, 224)
    assert ((inputs[:, 0].float().mean((1, 2)) / 40).round() == labels).all()
    clean, labels = stream[0].test.all()
    assert clean.shape == (6, 3, 224, 224)
    assert ((clean[:, 0].float().mean((1, 2)) / 40).round() == labels).all()
    assert stream[0].train.batch(torch.empty(0, dtype=torch.int64))[0].shape == (0, 3, 224, 224)
    (group,) = Evaluator(stream, device=torch.device("cpu"), batch_size=4).groups
    assert torch.equal(group.data.batch(torch.arange(6))[0], clean)
    (root / "imagenet_test_image_ids.txt").write_text("val/n03/val_1.JPEG\nval/n01/val_0.JPEG\n")
    listed = make(samples=None, shuffle=False, **options)
    assert listed[0].train.targets().tolist() == [2, 0]
    (root / "snow" / "5" / "n03" / "val_1.JPEG").unlink()
    with pytest.raises(MissingError, match=r"n03/val_1.JPEG is missing: put it there, as Zenodo 2235448"):
        make(**options)
    with pytest.raises(MissingError, match="frost/5 is missing or empty"):
        make(**{**options, "corruptions": ["frost"]})


def test_every_corruption_has_a_name_of_its_own():
    assert len(NAMES) == 19
    assert len(set(NAMES)) == 19


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"order": "gradual", "severity": 3}, "severity"),
        ({"concentration": 0.5}, "concentration"),
        ({"order": "mixed", "shuffle": False}, "shuffle"),
        ({"source": False, "augment": "flip_crop"}, "augment"),
    ],
    ids=str,
)
def test_options_that_the_order_does_not_use_are_refused(options: dict, key: str) -> None:
    with pytest.raises(UserError, match=rf"stream\.{key}: .* has no meaning here \(valid: .*; used with "):
        Corruptions(dataset="digits", samples=4, **options)
