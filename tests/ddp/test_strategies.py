"""Two processes with batch B end where one process with batch 2B ends, short last batches included."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("strategies_worker.py")
BASELINES = ["naive", "er", "derpp", "ewc", "si", "lwf", "joint", "cumulative"]
NAMES = [*BASELINES, "hnet", "hnet, lookahead", "hnet, network", "dp_hnet"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """(one process, [first of two, second of two])."""
    folder = tmp_path_factory.mktemp("ddp")
    two = [subprocess.Popen([sys.executable, WORKER, str(r), "2", folder]) for r in range(2)]
    spec = importlib.util.spec_from_file_location("strategies_worker", WORKER)
    worker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(worker)
    one = worker.results(0, 1)
    assert [p.wait(timeout=120) for p in two] == [0, 0]
    return one, [torch.load(folder / f"{r}.pt", weights_only=True) for r in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_weights_and_state_agree(outcomes, name):
    one, two = outcomes
    for mine in two:
        assert mine[name].keys() == one[name].keys()
        for key, value in one[name].items():
            torch.testing.assert_close(mine[name][key], value, atol=1e-9, rtol=1e-9, equal_nan=True)


@pytest.mark.parametrize("name", ["Reservoir", "ClassBalanced"])
def test_memories_are_the_same_everywhere(outcomes, name):
    one, two = outcomes
    for mine in two:
        for key, value in one[name].items():
            if key != "draw":
                assert torch.equal(mine[name][key], value), key
    assert torch.equal(torch.cat([mine[name]["draw"] for mine in two], dim=1), one[name]["draw"])


def test_every_strategy_learned_something(outcomes):
    one, _ = outcomes
    assert set(NAMES) < set(one)
    assert all(not torch.equal(one["naive"]["model.head.weight"], one[n]["model.head.weight"]) for n in BASELINES[1:])
