"""What a process does once is no run's training time."""

import random

import numpy as np
import torch
from mixed import mixed_config

import clplat
from clplat.lightning import Fabric
from clplat.run import loop, warmup


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002


def test_it_is_done_once_and_draws_nothing(monkeypatch):
    monkeypatch.setattr(warmup, "_warm", set())
    counted = []
    monkeypatch.setattr(warmup, "step_flops", lambda step: counted.append(step()))
    before = states()
    assert warmup.warm_up(Fabric(accelerator="cpu")) > 0
    assert warmup.warm_up(Fabric(accelerator="cpu")) == 0
    assert len(counted) == 2
    assert states() == before


def test_its_seconds_are_a_figure_of_their_own(tmp_path, monkeypatch):
    """On a clock that only the warm-up moves, training and evaluation take no time."""
    now = [0.0]

    def slow(fabric):
        now[0] += 100.0
        return 100.0

    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(loop, "warm_up", slow)
    config = mixed_config(tmp_path)
    config["loop"] |= {"stop_after": 1}
    cost = clplat.run(config, quiet=True).summary["cost"]
    assert cost["warmup_seconds"] == 100.0
    assert cost["train_seconds"] == cost["eval_seconds"] == 0.0
