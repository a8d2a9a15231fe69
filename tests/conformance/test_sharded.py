"""Every strategy that may learn by sharded weights ends on two processes that share them out where one process does."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from sharded_trials import STOPPED, ended, trial, work

from clplat.config import discovery
from clplat.config.settings import FabricSettings
from clplat.run import checkpoint
from clplat.run.launch import make_fabric
from clplat.strategy import why_not_sharded
from clplat.testing.subject import State

# What `.ci/run` asks for; the others take the steps of one of these, or of tests/ddp/test_fsdp.py: they merge and
# average, hold what is empty at first, copy a model, pass over data beside training, and pass within a pass.
EACH = ["gs_lora_pp", "moram", "npo", "aper", "l2p"]
NAMES = sorted(
    name
    for name, e in discovery.entries("strategies").items()
    if e.qualname.startswith("clplat.") and not why_not_sharded(discovery.load("strategies", name))
)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of the runs that are asked for."""
    mine = [i for i in request.session.items if isinstance(i, pytest.Function) and i.module is request.module]
    names = list(dict.fromkeys(i.callspec.params["name"] for i in mine if hasattr(i, "callspec")))
    folder, before = tmp_path_factory.mktemp("runs"), dict(os.environ)
    try:
        make_fabric(FabricSettings(accelerator="cpu", devices=2, strategy="fsdp")).launch(work, names, folder)
    finally:
        for key in os.environ.keys() - before.keys():  # the launcher leaves its port
            del os.environ[key]
    return folder


def found(runs: Path, name: str, rank: int) -> dict[str, Any]:
    state, _ = checkpoint.load_newest(runs / name / str(rank))
    assert state is not None
    return state


@pytest.mark.slow
@pytest.mark.support
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.thorough] * (n not in EACH)) for n in NAMES])
def test_sharded_weights_end_where_one_process_does(runs: Path, name: str, seen: Any) -> None:
    expected = ended(trial(name, None))
    for rank in range(2):
        straight = found(runs, name, rank)["straight"]
        assert straight["matrix"] == expected["matrix"]
        if name == "gs_lora_pp":  # it predicts with others than its weights, whose answers are 3e-5 away
            torch.testing.assert_close(straight["answers"], expected["answers"], atol=1e-5, rtol=0)
        assert not State({}, straight["tensors"]).differences(State({}, expected["tensors"]), 1e-5)
    seen(name, "fsdp")


@pytest.mark.slow
@pytest.mark.parametrize("name", STOPPED)
def test_what_was_copied_resumes_exactly(runs: Path, name: str) -> None:
    states = found(runs, name, 0)
    straight, resumed = (State({}, states[key]["tensors"]) for key in ("straight", "resumed"))
    assert not resumed.differences(straight)
