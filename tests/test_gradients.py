"""A second gradient: on one process autograd's own, on two that of the samples of both."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clplat import second_gradient

X = torch.tensor([[1.0, 0.0], [0.0, 3.0], [2.0, 2.0], [4.0, 0.0]])


def gradient(rows: slice, world_size: int) -> Tensor:
    """Of mean (w·x)² over some of the samples, in w and in a parameter that it does not depend on."""
    weight, idle = nn.Parameter(torch.tensor([1.0, 2.0])), nn.Parameter(torch.zeros(1))
    found = second_gradient((X[rows] @ weight).square().mean(), [weight, idle], world_size)
    assert weight.grad is None
    return found


def test_by_hand_and_zero_where_the_loss_does_not_depend() -> None:
    # mean of 2 (w·x) x over the samples, with w·x = 1, 6, 6, 4
    assert gradient(slice(None), 1).tolist() == [(2 + 24 + 32) / 4, (36 + 24) / 4, 0.0]


@pytest.mark.slow
def test_two_processes_have_the_gradient_of_all_samples(tmp_path: Path) -> None:
    both = [subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)]) for rank in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    for rank in range(2):
        assert torch.equal(torch.load(tmp_path / str(rank), weights_only=True), gradient(slice(None), 1))


if __name__ == "__main__":
    me, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.distributed.init_process_group("gloo", f"file://{folder}/meet", rank=me, world_size=2)
    torch.save(gradient(slice(2 * me, 2 * me + 2), 2), folder / str(me))
    torch.distributed.destroy_process_group()
