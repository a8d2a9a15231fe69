"""Sweeps with a made-up objective: a configuration to sweep, and what is measured of it."""

from pathlib import Path

import yaml

BASE = {"strategy": "naive", "stream": {"name": "digits"}, "backbone": "mlp", "seed": 0}
SPACE = {"strategy.lr": {"low": "1e-4", "high": "1e-1", "log": True}, "loop.batch_size": {"low": 8, "high": 64}}


def write(tmp_path, sweep_section=None, **changes) -> Path:
    path = tmp_path / "demo.yaml"
    section = {"trials": 4, "sampler": "random", "space": SPACE, **(sweep_section or {})}
    base = {**BASE, "output": str(tmp_path / "runs"), **changes}
    path.write_text(yaml.safe_dump({**base, "sweep": section}, sort_keys=False))
    return path


def objective(config, run_dir):
    """Best at batch size 32."""
    run_dir.mkdir(parents=True, exist_ok=True)
    value = 1 - abs(config["loop"]["batch_size"] - 32) / 100 + config["seed"] / 1000
    return {"metrics": {"average_accuracy": value}}
