"""Reduced WSRL and its controls, from one offline phase a seed, at equal steps in the environment.

    python experiments/wsrl/reduced.py pendulum|hopper OUTPUT_DIR SEED...

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
from clplat.config.resolve import resolve
from clplat.data.environments import Maker
from clplat.data.transitions import unpack
from clplat.run import checkpoint

SHARED = ("lr", "gamma", "polyak", "reward_scale", "batch")  # what the arms that are no WSRL take from its file
PENALTY = ("penalty", "penalty_actions", "max_backup", "target_members")  # Cal-QL's, of the offline phase


def arms(task: str) -> dict[str, dict[str, Any]]:
    """What differs from the configuration `wsrl/<task>`."""
    online = resolve(config=f"wsrl/{task}").strategy.options
    offline = resolve(config=f"wsrl/{task}_offline").strategy.options
    shared = {k: online[k] for k in SHARED}
    rlpd = {
        "name": "rlpd",
        "random_steps": online["warmup_steps"],
        **{k: online[k] for k in ("updates", "target_members")},
    }
    return {
        "no_warmup": {"strategy": {"warmup_steps": 0}},
        "random_wait": {"strategy": {"warmup_actions": "random"}},
        "wsrl": {},
        "cal_ql": {"strategy": {"name": "cal_ql", **shared, **{k: offline[k] for k in PENALTY}}},
        "rlpd": {"strategy": {**rlpd, **shared}, "stream": {"learn_from_data": True}},
    }


def data(task: str, folder: Path) -> Path:
    """Transitions of a SAC run, as an .npz in D4RL's layout."""
    file, name = folder / f"{task}_replay.npz", f"wsrl/{task}_data"
    if not file.exists():
        gym = Maker(resolve(config=name).stream.options["env"], {}, {})()
        run = clplat.run(name, output=str(folder / "runs"), quiet=True).run_dir
        state, _ = checkpoint.load_newest(run / "checkpoints")
        assert state is not None
        t = unpack(state["strategy"]["memory.stored.rows"], gym.actions)
        action = gym.low + (t.action.numpy() + 1) / 2 * (gym.high - gym.low)  # in the environment's units
        arrays = {"observations": t.observation, "next_observations": t.next_observation, "rewards": t.reward}
        arrays |= {"terminals": t.terminated, "timeouts": t.truncated}
        np.savez_compressed(file, actions=action, **{k: v.numpy() for k, v in arrays.items()})
    return file


def curve(run_dir: Path) -> dict[str, Any]:
    """Columns of a run's evaluations: steps in the environment, return, mean value and TD error on the probe; and the
    return of the policy that it began with."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    found = [m["metrics"] for m in lines if m["axis"] == "step" and "interact/return" in m["metrics"]]
    names = ("env_step", "return", "probe_q", "probe_td_error")
    columns = {name: [round(m[f"interact/{name}"], 4) for m in found if f"interact/{name}" in m] for name in names}
    (begun,) = json.loads((run_dir / "summary.json").read_text())["interaction"]
    return columns | {"start": round(begun["before"], 4)}


def main(task: str, folder: Path, seeds: list[int]) -> None:
    """Run what is not in results.json yet."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "results.json"
    results = json.loads(file.read_text()) if file.exists() else {}
    shared: dict[str, Any] = {"output": str(folder / "runs"), "quiet": True, "stream.data": str(data(task, folder))}
    for seed in seeds:
        found = results.setdefault(str(seed), {})
        missing = [arm for arm in arms(task) if arm not in found]
        if not missing:
            continue
        start = clplat.run(f"wsrl/{task}_offline", seed=seed, **shared).run_dir
        found["offline"] = curve(start)
        for arm in missing:
            options = {f"{part}.{k}": v for part, given in arms(task)[arm].items() for k, v in given.items()}
            options["start.run"] = None if arm == "rlpd" else str(start)
            run = clplat.run(f"wsrl/{task}", seed=seed, name=f"wsrl-{task}-{arm}", **shared, **options)
            found[arm] = curve(run.run_dir)
            file.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), [int(s) for s in sys.argv[3:]])
