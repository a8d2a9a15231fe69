"""CLIP protocols: label spaces, prompts, draws, the sets of torchvision, and whole runs."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import clplat
from clplat.config.resolve import resolve
from clplat.errors import MissingError, UserError
from clplat.run.build import build
from clplat.streams import clip as module
from clplat.streams.clip import MTIL, MTIL_2, PROMPTS, SMALL, XTAIL, Clip

pytestmark = pytest.mark.usefixtures("own_cache")


@pytest.fixture
def root(tmp_path) -> Path:
    """Two sets of ten classes with 6 training and 3 test images each; a class is a grey level, a set its first row."""
    folder = tmp_path / "data"
    for k, (name, shape) in enumerate({"mnist": (28, 28), "cifar10": (32, 32, 3)}.items()):
        (folder / name).mkdir(parents=True)
        for part, count in (("train", 6), ("test", 3)):
            labels = np.tile(np.arange(10), count)
            images = (
                np.full((len(labels), *shape), 0, np.uint8)
                + labels.reshape(-1, *[1] * len(shape)).astype(np.uint8) * 20
            )
            images[:, 0] = 100 * k
            np.savez(folder / name / f"{part}.npz", images=images, labels=labels)
    return folder


def test_one_label_space_with_a_prompt_for_each_class(root):
    stream = Clip(data_root=str(root), tasks=["mnist", "cifar10"], shots=2)
    assert stream.num_classes == 20
    assert [e.classes for e in stream] == [tuple(range(10)), tuple(range(10, 20))]
    assert [(len(e.train), len(e.test)) for e in stream] == [(20, 30), (20, 30)]
    for e in stream:
        assert sorted(set(e.train.targets().tolist())) == sorted(set(e.test.targets().tolist())) == list(e.classes)
    assert stream.class_names[3] == 'a photo of the number: "3".'
    assert stream.class_names[10] == "a photo of a airplane."
    rows = [[i - 3 for i in row if i > 2] for row in stream.answers.classes.tolist()]
    assert [bytes(row).decode() for row in rows] == list(stream.class_names)
    assert [row[(row >= 0).sum() - 1] for row in stream.answers.classes.numpy()] == [2] * 20
    assert stream.answers.classes[:, 0].tolist() == [1] * 20
    assert not stream.task_known
    assert stream.answers.tasks == ()
    told = Clip(data_root=str(root), benchmark="mtil", tasks=["mnist", "cifar10"])
    assert told.task_known
    assert told.answers.tasks == (tuple(range(10)), tuple(range(10, 20)))


def test_images_are_bytes_of_one_size_and_normalised_as_clip_does(root):
    stream = Clip(data_root=str(root), tasks=["mnist", "cifar10"], image_size=16)
    raw, labels = stream[1].test.all()
    assert raw.dtype == torch.uint8
    assert raw.shape[1:] == (3, 16, 16) == stream.input_shape
    assert torch.equal(raw[:, 1, 8, 8].long(), 20 * (labels - 10))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in module.STATISTICS)
    torch.testing.assert_close(stream.prepare(raw, True), (raw / 255 - mean) / std)
    grey, labels = stream[0].test.all()
    assert torch.equal(grey[:, 0], grey[:, 2])
    assert torch.equal(grey[:, 0, 8, 8].long(), 20 * labels)


def test_images_are_drawn_by_seed_a_set_by_itself(root):
    def drawn(seed, names, **more):
        stream = Clip(data_root=str(root), tasks=names, shots=2, seed=seed, test_per_class=1, **more)
        return {e.name: (e.train.all()[0], e.test.all()[0], e.train.targets() % 10) for e in stream}

    # Every image of a class is the same here, so that rows are told apart by the drawing function alone.
    labels = np.tile(np.arange(10), 6)
    rows = [module._some(labels, 2, module.generator(s, "shots mnist")) for s in (0, 0, 1)]
    assert np.array_equal(rows[0], rows[1])
    assert not np.array_equal(rows[0], rows[2])
    assert np.bincount(labels[rows[0]]).tolist() == [2] * 10
    one, other = drawn(3, ["mnist", "cifar10"]), drawn(3, ["cifar10"])
    assert torch.equal(one["cifar10"][0], other["cifar10"][0])
    assert torch.bincount(one["mnist"][2]).tolist() == [2] * 10
    assert len(one["mnist"][1]) == 10


def test_a_sets_draw_does_not_depend_on_the_others(root):
    labels = np.arange(300) % 10
    for name in ("train", "test"):
        images = np.zeros((300, 28, 28), np.uint8)
        images[:, 14:, 14:] = (np.arange(300) % 256).reshape(-1, 1, 1)  # tells the row
        np.savez(root / "mnist" / f"{name}.npz", images=images, labels=labels)
    first = Clip(data_root=str(root), tasks=["cifar10", "mnist"], shots=3, image_size=28)
    alone = Clip(data_root=str(root), tasks=["mnist"], shots=3, image_size=28)
    other = Clip(data_root=str(root), tasks=["mnist"], shots=3, image_size=28, seed=5)
    rows = [s[-1].train.all()[0][:, 0, -1, -1].tolist() for s in (first, alone, other)]
    assert rows[0] == rows[1] != rows[2]
    tests = [Clip(data_root=str(root), tasks=["mnist"], test_per_class=2, image_size=28, seed=s) for s in (0, 5)]
    assert torch.equal(*(s[0].test.all()[0] for s in tests))


def test_the_published_sequences():
    assert (len(MTIL), len(MTIL_2), len(XTAIL), len(SMALL)) == (11, 11, 10, 4)
    assert set(MTIL) == set(MTIL_2) == {*XTAIL, "cifar100"}
    assert (XTAIL[0], XTAIL[-1], MTIL_2[0], MTIL_2[-1]) == ("aircraft", "sun397", "cars", "cifar100")
    assert {*MTIL, *SMALL} == set(PROMPTS)
    assert all(prompt.count("{}") == 1 for prompt in PROMPTS.values())


def test_sets_of_torchvision(tmp_path):
    for label, level in (("AnnualCrop", 10), ("River", 200)):
        folder = tmp_path / "eurosat" / "2750" / label
        folder.mkdir(parents=True)
        for i in range(10):
            Image.new("RGB", (40, 20), (level, i, 0)).save(folder / f"{i}.png")
    dtd = tmp_path / "dtd" / "dtd"
    (dtd / "labels").mkdir(parents=True)
    for label in ("banded", "polka-dotted"):
        (dtd / "images" / label).mkdir(parents=True)
        for i in range(4):
            Image.new("L", (12, 30), 40 * i).save(dtd / "images" / label / f"{i}.png")
    for part, numbers in (("train", (0, 1)), ("test", (2, 3))):
        lines = [f"{label}/{i}.png" for label in ("banded", "polka-dotted") for i in numbers]
        (dtd / "labels" / f"{part}1.txt").write_text("\n".join(lines))
    stream = Clip(data_root=str(tmp_path), benchmark="xtail", absent="skip", shots=None, image_size=8)
    assert [e.name for e in stream] == ["dtd", "eurosat"]
    assert stream.class_names == (
        "banded texture.",
        "polka-dotted texture.",
        "a centered satellite photo of the AnnualCrop satellite location.",
        "a centered satellite photo of the River satellite location.",
    )
    assert [(len(e.train), len(e.test)) for e in stream] == [(4, 4), (16, 4)]
    raw, labels = stream[1].train.all()
    assert torch.equal(raw[:, 0, 4, 4], torch.where(labels == 2, 10, 200).to(torch.uint8))
    pixels = [
        set(zip(d.targets().tolist(), d.all()[0][:, 1, 4, 4].tolist(), strict=True))
        for d in (stream[1].train, stream[1].test)
    ]
    assert not pixels[0] & pixels[1]  # no image is in both parts
    assert len(pixels[0] | pixels[1]) == 20
    raw, _ = stream[0].test.all()
    assert sorted(raw[:, 0, 4, 4].tolist()) == [80, 80, 120, 120]


def test_a_picture_of_16_bits_is_not_cut_to_bytes():
    picture = Image.fromarray(np.full((8, 8), 40000, np.uint16))
    with pytest.raises(UserError, match=r"image 0 of list has 16 bits \(valid: 8"):
        module._stack([(picture, 0)], np.array([0]), 8)


def test_what_is_missing_or_wrong_is_named(root):
    with pytest.raises(MissingError) as caught:
        Clip(data_root=str(root))
    assert len(caught.value.faults) == 2  # fashion_mnist and notmnist, at once
    assert [e.name for e in Clip(data_root=str(root), absent="skip")] == ["mnist", "cifar10"]
    with pytest.raises(MissingError, match=r"aircraft is missing: put it below .*FGVCAircraft.*--stream\.absent skip"):
        Clip(data_root=str(root), benchmark="mtil")
    with pytest.raises(MissingError, match="data_root: not set"):
        Clip(tasks=["dtd"])
    (root / "mnist").rename(root / "cifar100")
    with pytest.raises(MissingError, match=r"cifar100/meta\.json is missing"):
        Clip(data_root=str(root), tasks=["cifar100"])
    (root / "cifar100" / "meta.json").write_text("{}")
    with pytest.raises(MissingError, match="fine_label_names"):
        Clip(data_root=str(root), tasks=["cifar100"])
    with pytest.raises(UserError) as faults:
        Clip(order=3, shots=0, test_per_class=0, image_size=4, tasks=["moon"])
    assert len(faults.value.faults) == 5


def _config(root, tmp_path, **more):
    return {
        "strategy": {"name": "naive", "optimizer": "adamw", "lr": 1e-3},
        "stream": {"name": "clip", "tasks": ["mnist", "cifar10"], "shots": 4, "image_size": 16},
        "backbone": {"name": "clip", "dim": 16, "depth": 1, "heads": 2},
        "loop": {"batch_size": 8, "max_epochs": 1, "checkpoint_seconds": None},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "data_root": str(root),
        "output": str(tmp_path / "runs"),
        **more,
    }


@pytest.mark.parametrize("strategy", ["naive", "er", "ewc", "joint", "lwf"])
def test_strategies_run_and_all_sets_are_scored_at_all_stages(strategy, root, tmp_path):
    config = _config(root, tmp_path)
    config["strategy"]["name"] = strategy
    result = clplat.run(config, quiet=True)
    matrix = result.accuracy_matrix
    assert len(matrix) == 3
    assert all(0 <= value <= 1 for row in matrix for value in row)
    assert result.metrics["transfer"] == pytest.approx(matrix[1][1])
    assert result.metrics["last"] == pytest.approx((matrix[2][0] + matrix[2][1]) / 2)


def test_a_resumed_run_is_the_run(root, tmp_path, cut):
    config = _config(root, tmp_path)
    config["strategy"] = {"name": "er", "optimizer": "adamw", "memory": 6, "replay_batch": 3}
    straight = clplat.run(config, quiet=True)
    folder = cut(config, 2)
    assert clplat.resume(folder, quiet=True).accuracy_matrix == straight.accuracy_matrix
    one, two = (clplat.load(f).state_dict() for f in (straight.run_dir, folder))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_a_told_task_can_only_help(root, tmp_path):
    """The same weights: the accuracy within a set's own classes is at least that among all."""
    config = _config(root, tmp_path)
    joint, strategy = build(resolve(config=config))
    config["stream"]["benchmark"] = "mtil"
    told, same = build(resolve(config=config))
    assert all(torch.equal(a, b) for a, b in zip(strategy.parameters(), same.parameters(), strict=True))
    for task in range(2):
        raw, labels = joint[task].test.all()
        x = joint.prepare(raw, False)
        all_right = joint.score(strategy.eval().predict(x), labels)
        own_right = told.score(same.eval().predict(x, task), labels)
        assert (own_right >= all_right).all()


@pytest.mark.skipif("CLPLAT_DATA" not in os.environ, reason="CLPLAT_DATA is not set")
def test_the_small_stream_on_the_data_root():
    real = Clip(data_root=ROOT, shots=2, test_per_class=3, absent="skip")
    assert {e.name for e in real} <= set(SMALL)
    assert all(len(e.train) == 20 and len(e.test) == 30 for e in real)


ROOT = os.environ.get("CLPLAT_DATA")
