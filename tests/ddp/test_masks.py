"""CoTTA on two processes: what is put back is the same everywhere, or the replicas part for good."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import clplat

STRATEGY = '''
from pathlib import Path
import torch
from clplat.strategies.cotta import CoTTA

class Noting(CoTTA):
    """CoTTA that leaves its masks and where it ends."""
    paper = "none: a test"
    drawn: list = []
    def _masks(self, parameters):
        self.drawn.append(torch.cat([m.flatten() for m in super()._masks(parameters)]))
        return [m.view_as(p) for m, p in zip(self.drawn[-1].split([p.numel() for p in parameters]), parameters)]
    def end(self, experience):
        super().end(experience)
        ends = [torch.cat([p.detach().flatten() for p in m.parameters()]) for m in (self.model, self.teacher.model)]
        torch.save([torch.stack(self.drawn), *ends], Path(__file__).with_name(f"{self.rank}.pt"))
'''


@pytest.mark.slow
def test_masks_of_restoration_are_the_same_on_all_processes(tmp_path: Path) -> None:
    file = tmp_path / "noting.py"
    file.write_text(STRATEGY)
    clplat.run(
        strategy={"name": f"{file}:Noting", "restore": 0.3, "augmentations": 1, "gate": 0.0},
        stream={"name": "corruptions", "source": False, "corruptions": ["fog"], "samples": 24, "clean": 0},
        backbone="cnn",
        head="linear",
        loop={"batch_size": 4, "representation": False},
        tracking={"enabled": False},
        output=str(tmp_path / "runs"),
        quiet=True,
        **{"fabric.devices": 2, "fabric.accelerator": "cpu"},
    )
    (masks, *ends), (others, *other_ends) = (torch.load(tmp_path / f"{r}.pt", weights_only=True) for r in range(2))
    assert masks.shape[0] == 3
    assert 0.25 < masks.float().mean() < 0.35
    assert torch.equal(masks, others)
    assert all(torch.equal(a, b) for a, b in zip(ends, other_ends, strict=True))
