"""SAC here and in stable-baselines3 on one MuJoCo task: the same settings, budget and evaluation episodes.

    python experiments/wsrl/against_sb3.py reacher OUTPUT_DIR SEED...    runs what OUTPUT_DIR/results_sac_reacher.json
                                                                         does not hold; or inverted_pendulum
    python experiments/wsrl/against_sb3.py results_sac_reacher.json      prints the table of README.md from it

Needs the development group. The networks' first weights are each library's own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from scipy import stats

import clplat
from clplat.config.resolve import resolve

EPISODES = 10


def here(name: str, seed: int, folder: Path) -> Callable[[np.ndarray], np.ndarray]:
    """The policy's mode after the run of the configuration."""
    run = clplat.run(name, seed=seed, output=str(folder / "runs"), quiet=True)
    return clplat.load(run.run_dir)


def there(name: str, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """The same of stable-baselines3, whose defaults for the rest are those of our configuration."""
    from stable_baselines3 import SAC

    config = resolve(config=name)
    options, nets = config.strategy.options, config.backbone.options
    agent = SAC(
        "MlpPolicy", gymnasium.make(config.stream.options["env"]), seed=seed, device="cpu",
        learning_rate=options["lr"], learning_starts=options["random_steps"], batch_size=options["batch"],
        gamma=options["gamma"], tau=options["polyak"], gradient_steps=options["updates"],
        policy_kwargs={"net_arch": {"pi": nets["actor_hidden"], "qf": nets["critic_hidden"]}},
    )  # fmt: skip
    agent.learn(config.stream.options["env_steps"])
    return lambda seen: agent.predict(seen, deterministic=True)[0]


def evaluated(name: str, act: Callable[[np.ndarray], np.ndarray]) -> list[float]:
    """Returns of `EPISODES` episodes, the same starts for all."""
    env, found = gymnasium.make(resolve(config=name).stream.options["env"]), []
    for episode in range(EPISODES):
        (seen, _), total, over = env.reset(seed=10_000 + episode), 0.0, False
        while not over:
            seen, reward, terminated, truncated, _ = env.step(act(seen))
            total, over = total + float(reward), terminated or truncated
        found.append(round(total, 2))
    return found


def main(task: str, folder: Path, seeds: list[int]) -> None:
    """Both of each seed."""
    config = f"wsrl/sac_{task}"
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"results_sac_{task}.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {"experiment": config, "runs": {}}
    for seed in map(str, seeds):
        for name, learn in (
            ("clplat", lambda s: here(config, s, folder)),
            ("stable-baselines3", lambda s: there(config, s)),
        ):
            found = results["runs"].setdefault(name, {})
            if seed not in found:
                found[seed] = {"returns": evaluated(config, learn(int(seed)))}
                results["measured"] = f"{datetime.now(UTC):%Y-%m-%d}"
                file.write_text(json.dumps(results, indent=1) + "\n")


def table(results: dict[str, Any]) -> str:
    """Each seed's mean, their mean with half the 95 % interval of Student's t, and the difference (Welch)."""
    lines, of = ["| SAC of | mean return of each seed | mean over seeds |", "|---|---|---|"], {}
    for name, runs in results["runs"].items():
        of[name] = means = [float(np.mean(run["returns"])) for run in runs.values()]
        half = stats.t.ppf(0.975, len(means) - 1) * np.std(means, ddof=1) / np.sqrt(len(means))
        lines.append(f"| {name} | {', '.join(f'{m:.1f}' for m in means)} | {np.mean(means):.1f} ± {half:.1f} |")
    found = stats.ttest_ind(*of.values(), equal_var=False)
    low, high = found.confidence_interval()
    lines.append(f"\nclplat less stable-baselines3: {low:.1f} to {high:.1f} (95 %), p = {found.pvalue:.2f}")
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1].endswith(".json"):
        print(table(json.loads(Path(sys.argv[1]).read_text())))
    else:
        main(sys.argv[1], Path(sys.argv[2]), [int(s) for s in sys.argv[3:]])
