"""Inputs are normalised once, as the network's weights need it; and looked at before a run."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from clplat.backbones.cnn import resnet20
from clplat.backbones.resnets import resnext29
from clplat.config.resolve import resolve
from clplat.errors import UserError
from clplat.run.build import build
from clplat.stream import Data, Experience, Kind, Stream

OWN = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.2, 0.1]}
RNG = np.random.default_rng(0)


@pytest.fixture
def weights(tmp_path) -> Path:
    """Weights of a ResNet-20, with the statistics they were trained with beside them."""
    (tmp_path / "net").mkdir()
    save_file(resnet20((3, 8, 8)).state_dict(), tmp_path / "net" / "model.safetensors")
    (tmp_path / "net" / "config.json").write_text(json.dumps(OWN))
    return tmp_path / "net" / "model.safetensors"


@pytest.fixture
def root(tmp_path) -> Path:
    """A data root with a small cifar10."""
    (tmp_path / "cifar10").mkdir()
    for part in ("train", "test"):
        images = RNG.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8)
        np.savez(tmp_path / "cifar10" / f"{part}.npz", images=images, labels=np.arange(20) % 10)
    return tmp_path


def built(root: Path, stream: str = "images", **keys):
    return build(resolve(strategy="naive", stream=stream, backbone="resnet20", data_root=str(root), **keys))


def fed(stream, learner) -> torch.Tensor:
    """What reaches the network's first layer."""
    seen = []
    handle = learner.model.backbone.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    learner.eval().predict(stream.prepare(stream[0].train.all()[0], False))
    handle.remove()
    return seen[0]


def by(stream, mean: list[float], std: list[float]) -> torch.Tensor:
    raw = stream[0].train.all()[0].float() / 255
    return (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def test_weights_that_say_what_they_need_get_it_and_the_streams_default_is_left_out(root, weights):
    stream, learner = built(root, **{"backbone.weights": str(weights)})
    torch.testing.assert_close(fed(stream, learner), by(stream, OWN["mean"], OWN["std"]))
    assert stream.notes == (
        "stream.normalize: none, since the backbone normalises by mean 0.5/0.4/0.3, deviation 0.2/0.2/0.1",
    )


def test_a_stream_that_puts_requests_into_another_does_so_too(root, weights):
    options = {"stream.base": "images", "backbone.weights": str(weights), "strategy": "acu"}
    stream, learner = build(resolve(stream="unlearning", backbone="resnet20", data_root=str(root), **options))
    seen = []
    learner.model.backbone.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    learner.model.eval()(stream.prepare(stream[0].train.all()[0], False))
    torch.testing.assert_close(seen[0], by(stream, OWN["mean"], OWN["std"]))


def test_without_such_weights_the_stream_normalises(root):
    stream, learner = built(root)
    torch.testing.assert_close(fed(stream, learner), by(stream, *stream.normalize))
    assert stream.notes == ()


def test_told_twice_is_refused_and_told_alike_is_once(root, weights):
    for keys in ({"backbone.weights": str(weights)}, {"backbone.normalize": "half"}):
        with pytest.raises(UserError, match=r"stream\.normalize: images would be normalised twice.*backbone\.norm"):
            built(root, **{"stream.normalize": "dataset", **keys})
    alike = {"stream.normalize": "imagenet", "backbone.normalize": "imagenet"}
    stream, learner = built(root, **alike)
    expected = by(stream, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    torch.testing.assert_close(fed(stream, learner), expected)
    assert stream.notes == ()


def test_what_the_weights_were_not_trained_with_is_said(root, weights):
    keys = {"backbone.weights": str(weights), "backbone.normalize": "none"}
    stream, learner = built(root, **keys)
    torch.testing.assert_close(fed(stream, learner), by(stream, *stream.normalize))
    assert "the weights were trained on images normalised by mean 0.5/0.4/0.3" in stream.notes[0]
    stream, _ = built(root, **{**keys, "backbone.normalize": "half"})
    assert any("by mean 0.5, deviation 0.5, but the weights were trained with mean 0.5/0.4" in n for n in stream.notes)


def test_images_beyond_one_are_refused_by_a_network_that_normalises(root, tmp_path):
    images = RNG.uniform(0, 255, (20, 3, 8, 8))
    arrays = {f"{part}_{what}": v for part in ("train", "test") for what, v in
              (("inputs", images), ("labels", np.arange(20) % 10))}  # fmt: skip
    np.savez(tmp_path / "own.npz", **arrays)
    keys = {"stream.path": str(tmp_path / "own.npz"), "backbone.normalize": "imagenet"}
    with pytest.raises(UserError, match=r"backbone\.normalize: takes images in \[0, 1\].*reach from .* to 25[45]"):
        built(root, "arrays", **keys)
    stream, learner = built(root, "arrays", **keys, **{"stream.scale": 255})
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))
    raw = torch.from_numpy(images[stream[0].train.rows].astype(np.float32)) / 255
    torch.testing.assert_close(fed(stream, learner), (raw - mean) / std)


def test_statistics_that_a_checkpoint_holds_itself(tmp_path):
    state = {**resnext29((3, 8, 8)).state_dict(), "mu": torch.full((1, 3, 1, 1), 0.25), "sigma": torch.ones(1, 3, 1, 1)}
    save_file(state, tmp_path / "w.safetensors")
    assert resnext29((3, 8, 8), weights=str(tmp_path / "w.safetensors")).input_mean.flatten().tolist() == [0.25] * 3


def test_faulty_statistics_beside_weights_are_refused(weights):
    (weights.parent / "config.json").write_text(json.dumps({"mean": [0.5], "std": [0]}))
    with pytest.raises(UserError, match=r"config\.json has mean \[0\.5\] and std \[0\]"):
        resnet20((3, 8, 8), weights=str(weights))


@pytest.mark.parametrize("part", ["training", "test", "validation"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_inputs_that_are_not_finite_are_named_by_their_row(part, value):
    parts = {name: torch.zeros(6, 2, 3) for name in ("training", "test", "validation")}
    parts[part][4, 1, 2] = parts[part][5, 0, 0] = value
    data = [Data(x, torch.zeros(6, dtype=torch.int64), torch.arange(3)) for x in parts.values()]
    with pytest.raises(UserError, match=rf"stream: {part} inputs hold {value} in row 4 \(and 1 more rows\)"):
        Stream([Experience(0, "a", Kind.LEARN, *data)], num_classes=1, input_shape=(2, 3))
