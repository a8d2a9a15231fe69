"""WSRL on Pendulum and its controls, from one offline phase a seed, at equal steps in the environment.

    python experiments/wsrl/pendulum.py OUTPUT_DIR SEED...

Makes the data once (a SAC run, seed 0), then for each seed the offline phase and every arm of `ARMS` from it, and
writes what results.json holds to OUTPUT_DIR/results.json after each: what is there already is not run again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

import clplat
from clplat.data.transitions import unpack
from clplat.run import checkpoint

WAIT = 600  # as in pendulum.yaml
SHARED = {"lr": 0.001, "gamma": 0.97, "polyak": 0.02, "reward_scale": 0.1, "batch": 128}
PENALTY = {"penalty": 1.0, "penalty_actions": 4, "max_backup": 4, "target_members": 2}
ARMS: dict[str, dict[str, Any]] = {
    "no_warmup": {"strategy": {"warmup_steps": 0}},
    "random_wait": {"strategy": {"warmup_actions": "random"}},
    "wsrl": {},
    "cal_ql": {"strategy": {"name": "cal_ql", **SHARED, **PENALTY}},
    "rlpd": {
        "strategy": {"name": "rlpd", **SHARED, "updates": 4, "target_members": 2, "random_steps": WAIT},
        "stream": {"learn_from_data": True},
    },
}


def data(folder: Path) -> Path:
    """Transitions of a SAC run, from random to nearly solved, as an .npz."""
    file = folder / "pendulum_replay.npz"
    if not file.exists():
        run = clplat.run("wsrl/pendulum_data", output=str(folder / "runs"), quiet=True).run_dir
        state, _ = checkpoint.load_newest(run / "checkpoints")
        assert state is not None
        t = unpack(state["strategy"]["memory.stored.rows"], 1)
        torque = 2 * t.action  # in the environment's units
        arrays = {"observations": t.observation, "actions": torque, "rewards": t.reward, "terminals": t.terminated}
        arrays |= {"next_observations": t.next_observation, "timeouts": t.truncated}
        np.savez_compressed(file, **{k: v.numpy() for k, v in arrays.items()})
    return file


def curve(run_dir: Path) -> dict[str, list[float]]:
    """Columns of a run's evaluations: steps in the environment, return, mean value and TD error on the probe."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [m["metrics"] for m in lines if m["axis"] == "step" and "interact/return" in m["metrics"]]
    names = ("env_step", "return", "probe_q", "probe_td_error")
    return {name: [round(m[f"interact/{name}"], 4) for m in found if f"interact/{name}" in m] for name in names}


def main(folder: Path, seeds: list[int]) -> None:
    """Run what is not in results.json yet."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    path = str(data(folder))
    for seed in seeds:
        if "offline" in results.get(str(seed), {}):
            start = results[str(seed)]["offline"]["run"]
        else:
            found = clplat.run(
                "wsrl/pendulum_offline", seed=seed, output=str(folder / "runs"), quiet=True, **{"stream.data": path}
            )
            start = str(found.run_dir)
            results[str(seed)] = {"offline": {"run": start, **curve(found.run_dir)}}
        for arm, changes in ARMS.items():
            if arm in results[str(seed)]:
                continue
            options = {f"{part}.{k}": v for part, given in changes.items() for k, v in given.items()}
            options |= {"stream.data": path, "start.run": None if arm == "rlpd" else start}
            run = clplat.run(
                "wsrl/pendulum", seed=seed, output=str(folder / "runs"), quiet=True,
                name=f"wsrl-pendulum-{arm}", **options,
            )  # fmt: skip
            results[str(seed)][arm] = curve(run.run_dir)
            file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(s) for s in sys.argv[2:]])
