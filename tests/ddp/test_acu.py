"""Analytic learning and unlearning on two processes: the sums of one, whatever the shares, also from a checkpoint."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import clplat
from clplat.components.ridge import Ridge

TWO = {"fabric.devices": 2, "fabric.accelerator": "cpu"}
# 13 samples a batch over two processes: shares of 7 and 6, and a ragged last batch.
CONFIG: dict[str, Any] = {
    "stream": {
        "name": "unlearning",
        "base": "digits",
        "base_options": {"experiences": 2},
        "requests": [[f"sample:{r}" for r in range(20)], "class:3"],
    },
    "backbone": {"name": "mlp", "hidden": [50]},
    "loop": {"batch_size": 13, "checkpoint_seconds": None, "representation": False},
    "tracking": {"enabled": False},
    "seed": 1,
}


def config(folder: Path, **strategy: Any) -> dict[str, Any]:
    return {**CONFIG, "strategy": {"name": "acu", "width": 100, **strategy}, "output": str(folder)}


def state(run_dir: Path) -> dict[str, torch.Tensor]:
    return {k: v for k, v in clplat.load(run_dir).state_dict().items() if isinstance(v, torch.Tensor)}


@pytest.mark.slow
@pytest.mark.parametrize("options", [{}, {"gamma": 50.0, "bits": None, "per_class": True}])
def test_two_processes_with_uneven_shares_equal_one(options: dict[str, Any], tmp_path: Path) -> None:
    """To 1e-12; the sums bit for bit where features are rounded. γ counted twice would show: 50 is a lot."""
    one = clplat.run(config(tmp_path / "1", **options), quiet=True)
    two = clplat.run(config(tmp_path / "2", **options), quiet=True, **TWO, **{"loop.batch_size": 7})
    expected, found = state(one.run_dir), state(two.run_dir)
    for name, value in expected.items():
        if not name.startswith("ridge."):
            continue
        assert value.shape == found[name].shape
        if options.get("bits", 14) is not None and "gram" in name:
            assert torch.equal(value.tril(), found[name].tril()), name
        difference = (value.double().tril() if "gram" in name else value.double()) - (
            found[name].double().tril() if "gram" in name else found[name].double()
        )
        assert difference.norm() <= 1e-12 * value.double().norm().clamp(min=1), name
    assert two.accuracy_matrix == one.accuracy_matrix


def samples() -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    x = torch.relu(torch.randn(41, 12, generator=draw, dtype=torch.float64))
    return torch.round(x * 2**14) / 2**14, torch.randint(4, (41,), generator=draw)


def learner(per_class: bool) -> Ridge:
    ridge = Ridge(12, 3.0, bits=14, inverse=True, per_class=per_class)
    ridge.grow(4)
    return ridge


def worker(rank: int, folder: str, per_class: bool) -> None:
    """Learns its share of the samples, with a checkpoint on the way; leaves the state that it ends with."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    reductions, reduce = [0], torch.distributed.all_reduce

    def counted(*args: Any, **kwargs: Any) -> Any:
        reductions[0] += 1
        return reduce(*args, **kwargs)

    torch.distributed.all_reduce = counted
    (x, y), ridge = samples(), learner(per_class)
    ridge.open()
    ridge.add(x[:10], y[:10]) if rank == 0 else ridge.add(x[:0], y[:0])  # a share may be empty
    ridge.close()
    assert reductions == [1]
    ridge.open()
    share = slice(10, 23) if rank == 0 else slice(23, 41)
    half = share.start + 7
    ridge.add(x[share.start : half], y[share.start : half])
    ridge.merge()
    saved = [{k: v.clone() for k, v in ridge.state_dict().items()}]
    torch.distributed.broadcast_object_list(saved, src=0)  # a checkpoint is what process 0 holds
    straight, resumed = ridge, learner(per_class)
    resumed.load_state_dict(saved[0])
    for one in (straight, resumed):
        one.add(x[half : share.stop], y[half : share.stop])
        one.close()
    torch.save([straight.state_dict(), resumed.state_dict(), saved[0]], f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("per_class", [False, True])
def test_a_checkpoint_inside_an_experience_holds_the_samples_of_both_processes(per_class: bool, tmp_path: Path) -> None:
    (tmp_path / "store").touch()
    command = [sys.executable, __file__, str(tmp_path), str(per_class)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2])}
    workers = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(2)]
    assert [w.wait(240) for w in workers] == [0, 0]
    (x, y), one = samples(), learner(per_class)
    one.add(x, y)
    one.close()
    for rank in range(2):
        straight, resumed, saved = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert saved["apart"]
        assert torch.equal(saved["counts"], torch.bincount(torch.cat([y[:17], y[23:30]]), minlength=4))
        for name, tensor in one.state_dict().items():
            for found in (straight, resumed):
                assert torch.equal(found[name].tril() if "gram" in name else found[name],
                                   tensor.tril() if "gram" in name else tensor), (rank, name)  # fmt: skip


if __name__ == "__main__":
    worker(int(sys.argv[3]), sys.argv[1], sys.argv[2] == "True")
