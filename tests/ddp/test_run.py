"""Whole runs on two CPU processes against the same run on one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mixed import mixed_config
from safetensors.torch import load_file

import clplat
from clplat.errors import UserError
from clplat.run import checkpoint

TWO = {"fabric.devices": 2, "fabric.accelerator": "cpu"}
# 288 or so samples an experience: the last of the global batches is ragged.
DIGITS = {"quiet": True, "tracking": {"enabled": False}, "seed": 3, "loop": {"max_epochs": 2}}


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in clplat.load(run_dir).state_dict().items() if isinstance(v, torch.Tensor)}


# A ReLU may fall on the other side by one rounding, and two float32 runs then part by whole gradients; a tanh can't.
SMOOTH = """
from torch import nn
from clplat.backbones.mlp import MLP

def smooth(input_shape: tuple[int, ...]) -> MLP:
    '''Two layers with tanh.'''
    net = MLP(input_shape[0] * input_shape[1] * input_shape[2], [400, 400])
    for layer in net.net:
        layer[1] = nn.Tanh()
    return net
"""
# With batch normalisation, which divides by deviations that may be small, in double precision.
NORMAL = (
    SMOOTH.replace("nn.Tanh()\n", "nn.Sequential(nn.BatchNorm1d(400), nn.Tanh())\n")
    .replace("return net", "return net.double()")
    .replace("MLP(", "Double(")
    .replace(
        "def smooth",
        """class Double(MLP):
    def features(self, inputs):
        return super().features(inputs.double()).float()

def smooth""",
    )
)


@pytest.mark.slow
@pytest.mark.parametrize("network", [SMOOTH, NORMAL], ids=["smooth", "batch norm"])
@pytest.mark.parametrize(("strategy", "one", "two"), [
    ("naive", {}, {}),
    ("er", {"strategy.replay_batch": 32, "strategy.memory": 60}, {"strategy.replay_batch": 16, "strategy.memory": 60}),
])  # fmt: skip
def test_two_processes_equal_one_with_the_doubled_batch(
    strategy: str, one: dict[str, Any], two: dict[str, Any], network: str, tmp_path: Path
) -> None:
    (tmp_path / "smooth.py").write_text(network)
    digits = {
        **DIGITS,
        "strategy": strategy,
        "backbone": f"{tmp_path / 'smooth.py'}:smooth",
        "loop.representation": False,
    }
    single = clplat.run(output=str(tmp_path / "1"), **{"loop.batch_size": 32}, **one, **digits)
    double = clplat.run(output=str(tmp_path / "2"), **{"loop.batch_size": 16}, **two, **TWO, **digits)
    expected, found = weights(single.run_dir), weights(double.run_dir)
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        if value.is_floating_point():
            assert torch.allclose(value, found[name], rtol=0, atol=1e-5), name
        else:  # what memories hold, and how much they have seen
            assert torch.equal(value, found[name]), name
    # One test sample of an experience's 72 may lie on a tie.
    np.testing.assert_allclose(np.array(double.accuracy_matrix), np.array(single.accuracy_matrix), atol=1.5 / 72)


@pytest.mark.slow
def test_two_processes_resume_exactly(tmp_path: Path) -> None:
    """A run cut at a checkpoint inside an experience and resumed on two processes is the uninterrupted one."""
    import shutil

    config = mixed_config(tmp_path)
    config["loop"] |= {"checkpoint_every": 5, "max_epochs": 1, "batch_size": 4, "stop_after": 4}
    straight = clplat.run(config, quiet=True, **TWO)
    # An earlier checkpoint of the same run stands for the one that a crash would leave.
    crashed = tmp_path / "crashed"
    shutil.copytree(straight.run_dir, crashed)
    newest = sorted((crashed / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    state, _ = checkpoint.load_newest(crashed / "checkpoints")
    assert state is not None
    assert not state["progress"]["trained"] or state["progress"]["experience"] == 3
    resumed = clplat.resume(crashed, quiet=True)
    assert resumed.accuracy_matrix == straight.accuracy_matrix
    assert resumed.metrics == straight.metrics
    expected, found = weights(straight.run_dir), weights(crashed)
    assert all(torch.equal(v, found[k]) for k, v in expected.items())


@pytest.mark.slow
def test_errors_of_a_process_reach_the_user(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not handle kind"):
        clplat.run(mixed_config(tmp_path), strategy="naive", quiet=True, **TWO)


@pytest.mark.slow
def test_two_processes_keep_the_predictions_of_one(tmp_path: Path) -> None:
    """Ragged last batches included; in the stream's order."""
    loop = {"batch_size": 32, "keep_predictions": True, "max_steps": 8}
    shared = {"strategy": "source", "stream": "corruptions", "stream.samples": 45, "backbone": "mlp", "quiet": True,
              "stream.corruptions": ["fog"], "tracking.enabled": False}  # fmt: skip
    one = clplat.run(output=str(tmp_path / "1"), loop=loop, **shared)
    two = clplat.run(output=str(tmp_path / "2"), loop=loop | {"batch_size": 16}, **shared, **TWO)
    files = [sorted((Path(r.run_dir) / "predictions").iterdir()) for r in (one, two)]
    assert [f.name for f in files[0]] == [f.name for f in files[1]] != []
    for a, b in zip(*files, strict=True):
        mine, other = load_file(a), load_file(b)
        assert torch.equal(mine["rows"], other["rows"])
        assert torch.equal(mine["labels"], other["labels"])
        torch.testing.assert_close(mine["predictions"], other["predictions"], atol=1e-4, rtol=1e-4)
    errors = [1 - (load_file(f)["predictions"].argmax(1) == load_file(f)["labels"]).float().mean() for f in files[1]]
    assert two.metrics["online_error"] == pytest.approx(sum(map(float, errors)) / len(errors))
