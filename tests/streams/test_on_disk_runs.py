"""A run on data that stay on disk is the run on the same data in memory, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from on_disk import write_arrays, write_pictures

import clplat
from clplat.config.resolve import resolve
from clplat.data.decoded import Decoded
from clplat.errors import UserError
from clplat.run.build import build

VIT = {"name": "vit_micro", "patch_size": 4, "dim": 16, "depth": 1, "heads": 2}
ER = {"name": "er", "memory": 12, "replay_batch": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CLPLAT_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def config(tmp_path) -> dict[str, Any]:
    """Two experiences of two classes: 12 pictures to train on in each, batches of 5, two epochs."""
    pictures = write_pictures(tmp_path / "own", train=8, test=3)
    stream = {"name": "images", "path": str(pictures), "experiences": 2, "workers": 2}
    return {
        "stream": {**stream, "augment": "flip_crop", "validation": 0.25},
        "strategy": dict(ER),
        "backbone": "cnn",
        "loop": {"batch_size": 5, "max_epochs": 2, "eval_every": 4, "eval_batch_size": 4},
        "tracking": {"enabled": False},
        "output": str(tmp_path / "runs"),
        "seed": 3,
    }


def on_disk(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "stream": {**config["stream"], "in_memory": False}}


def same(one: Any, other: Any) -> None:
    assert one.accuracy_matrix == other.accuracy_matrix
    a, b = (clplat.load(r.run_dir).state_dict() for r in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a if isinstance(a[k], torch.Tensor))


@pytest.mark.parametrize("backbone", ["cnn", pytest.param(VIT, marks=pytest.mark.slow)], ids=["cnn", "vit"])
def test_pictures(config, backbone):
    config["backbone"] = backbone
    same(clplat.run(config, quiet=True), clplat.run(on_disk(config), quiet=True))


@pytest.mark.slow
def test_a_strategy_that_goes_over_an_experience_once_more(config):
    config |= {"strategy": "ewc", "backbone": "mlp"}
    del config["stream"]["augment"]
    same(clplat.run(config, quiet=True), clplat.run(on_disk(config), quiet=True))


@pytest.mark.slow
def test_a_head_of_class_means_and_requests_to_forget(config):
    config |= {"backbone": "mlp", "head": "ncm", "strategy": {"name": "finetune_retained", "memory": 12}}
    base = config["stream"]
    for options in (base, on_disk(config)["stream"]):
        config["stream"] = {"name": "unlearning", "base": "images", "count": 1,
                            "base_options": {k: v for k, v in options.items() if k != "name"}}  # fmt: skip
        config["loop"]["forget_epochs"] = 1
        options["result"] = clplat.run(config, quiet=True)
    same(base["result"], options["result"])


def test_arrays_in_files_under_a_world(config, tmp_path):
    rng = np.random.default_rng(0)
    labels = np.arange(90) % 3
    folder = write_arrays(tmp_path / "arrays", rng.normal(size=(90, 6)) + labels[:, None], labels)
    config["stream"] = {"name": "arrays", "path": str(folder), "scenario": "permuted", "experiences": 2}
    config["backbone"] = "mlp"
    same(clplat.run(config, quiet=True), clplat.run(on_disk(config), quiet=True))


def test_resumed_within_an_epoch(config, cut):
    straight = clplat.run(config, quiet=True)
    folder = cut(on_disk(config), 5)
    same(straight, clplat.resume(folder, quiet=True))


@pytest.mark.slow
def test_two_processes(config):
    config |= {"backbone": "mlp", "fabric": {"devices": 2, "accelerator": "cpu"}}
    same(clplat.run(config, quiet=True), clplat.run(on_disk(config), quiet=True))


def test_a_resumed_run_reads_nothing_that_it_has_trained_on(config, cut, monkeypatch):
    config |= {"strategy": "naive", "backbone": "mlp", "loop": {"batch_size": 5, "representation": False}}
    folder, read, original = cut(on_disk(config), 2), list[str](), Decoded.read

    def noting(self, rows, out):
        read.extend(str(self.path(r)) for r in rows)
        original(self, rows, out)

    monkeypatch.setattr(Decoded, "read", noting)
    clplat.resume(folder, quiet=True)
    trained = [name for name in read if "/train/" in name]
    assert len(trained) == len(set(trained)) == 12 - 10


@pytest.mark.parametrize("strategy", ["joint", "gem"])
def test_refused_where_a_strategy_holds_all_of_it(config, strategy):
    config["strategy"] = strategy
    with pytest.raises(UserError, match=r"strategy: \w+ holds all samples .* \(valid: stream\.in_memory true, or"):
        build(resolve(config=on_disk(config)))
    build(resolve(config=config))


def test_what_was_chosen_is_said(config, monkeypatch):
    from clplat.data import on_disk as module

    monkeypatch.setattr(module, "free_memory", lambda: 4 * 44 * 432 - 1)
    stream, _ = build(resolve(config=config))
    (said,) = (note for note in stream.notes if "in_memory" in note)
    assert "false, above a quarter of the 0.0 GB that are free: the 44 pictures of" in said
    monkeypatch.setattr(module, "free_memory", lambda: 10**9)
    assert not any("in_memory" in note for note in build(resolve(config=config))[0].notes)


def test_a_damaged_picture_ends_the_run_with_its_name(config):
    broken = Path(config["stream"]["path"]) / "train" / "0" / "1.jpg"
    broken.write_bytes(broken.read_bytes()[:-300])  # its head is whole
    config["stream"]["normalize"] = "none"
    with pytest.raises(clplat.MissingError, match=r"train/0/1\.jpg can't be read \(.*replace it by a whole picture"):
        clplat.run(on_disk(config), quiet=True)
