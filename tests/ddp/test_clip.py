"""CLIP and its stream on two CPU processes against the same run on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clplat
from clplat.config.resolve import resolve
from clplat.run.build import build


def config(folder: Path) -> dict[str, Any]:
    """Two sets of ten classes with 3 images each: global batches of 8, the last one of 6."""
    draw = np.random.default_rng(0)
    for name, shape in {"mnist": (28, 28), "cifar10": (32, 32, 3)}.items():
        (folder / name).mkdir(parents=True)
        for part in ("train", "test"):
            labels = np.tile(np.arange(10), 3)
            images = draw.integers(0, 256, (len(labels), *shape), dtype=np.uint8)
            np.savez(folder / name / f"{part}.npz", images=images, labels=labels)
    return {
        "strategy": {"name": "naive", "lr": 0.01},
        "stream": {"name": "clip", "tasks": ["mnist", "cifar10"], "shots": 3, "image_size": 16},
        "backbone": {"name": "clip", "dim": 16, "depth": 1, "heads": 2},
        "loop": {"batch_size": 8, "checkpoint_seconds": None, "representation": False},
        "fabric": {"accelerator": "cpu"},
        "tracking": {"enabled": False},
        "data_root": str(folder),
        "output": str(folder / "runs"),
        "seed": 1,
    }


@pytest.mark.slow
@pytest.mark.parametrize("replay", [{}, {"name": "er", "memory": 20}], ids=["naive", "er"])
def test_two_processes_equal_one_with_the_doubled_batch(replay: dict[str, Any], tmp_path: Path) -> None:
    """Both towers learn; images and prompts go through one loss, so each process reads all prompts that compete."""
    given = config(tmp_path)
    given["strategy"] |= replay
    whole, half = ({"strategy.replay_batch": n} if replay else {} for n in (8, 4))
    one = clplat.run(given, quiet=True, **whole)
    two = clplat.run(given, quiet=True, **half, **{"fabric.devices": 2, "loop.batch_size": 4})
    expected, found = (clplat.load(r.run_dir).state_dict() for r in (one, two))
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(found[name], value, atol=1e-5, rtol=0, msg=name)
    # One of a set's 30 test samples may lie on a tie.
    np.testing.assert_allclose(np.array(two.accuracy_matrix), np.array(one.accuracy_matrix), atol=1.5 / 30)
    _, untrained = build(resolve(config=given))
    for name, value in untrained.named_parameters():
        assert torch.equal(value, found[name]) == (name == "model.backbone.net.logit_scale"), name
