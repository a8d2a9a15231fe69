"""What tests of the dashboard are shown: made-up runs of every kind, and a study."""

import json

import yaml


def amend(folder, **changes):
    """Change a run's summary; `tags` go into its configuration."""
    summary, config = (
        json.loads((folder / "summary.json").read_text()),
        yaml.safe_load((folder / "config.yaml").read_text()),
    )
    config["tracking"]["tags"] = changes.pop("tags", {})
    metrics = {**summary["metrics"], **changes.pop("metrics", {})}
    (folder / "summary.json").write_text(json.dumps({**summary, "metrics": metrics, **changes}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


STUDY = {
    "study": "er-digits", "metrics": ["plasticity", "train_seconds"], "directions": ["maximize", "minimize"],
    "protocol": "tuned on the first 2 experiences", "effort": "5 trials, 5 runs, 31 s in training and evaluation",
    "gain": "default → best, on validation data: plasticity 0.7000 → 0.9000 (+0.2000)",
    "best": {"number": 3, "values": [0.9, 14.0], "params": {"strategy.lr": 0.1}},
    "front": [{"number": 1, "values": [0.6, 3.0]}, {"number": 3, "values": [0.9, 14.0]}],
    "trials": [{"number": i, "values": v, "params": {"strategy.lr": 0.1 * (i + 1)}, "default": i == 0}
               for i, v in enumerate([[0.7, 9.0], [0.6, 3.0], [0.5, 8.0], [0.9, 14.0], None])],
}  # fmt: skip


def furnish(make, root):
    """Runs with something for every panel: two streams to learn, one each to forget, adapt and interact; a study."""
    for seed in range(3):
        for name in ("joint", "ilora", "er", "naive"):
            gap = {"stability_gap": 0.02 * len(name) + 0.01 * seed, "minimum_accuracy": 0.5 + 0.01 * seed}
            for stream, experiences in (("digits", 5), ("images", 10)):
                folder = make(strategy=name, stream=stream, seed=seed, experiences=experiences)
                amend(folder, metrics=gap, tags={"team": "vision" if name == "er" else "language"},
                      git_commit=("a" if seed else "b") * 40 if name == "naive" else "a" * 40)  # fmt: skip
        for i, name in enumerate(("gs_lora", "acu")):
            erased = {
                "forget_accuracy": 0.05 + 0.02 * i,
                "retain_accuracy": 0.9 - 0.04 * i,
                "h_mean": 0.9,
                "relapse": 0.0,
            }
            amend(make(strategy=name, stream="unlearning", seed=seed, kind="forget"), metrics=erased)
            domains = ("gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "elastic_transform")
            table = {
                "segments": [{"domain": d, "round": r, "error": 0.3 + 0.03 * k + 0.05 * i} for r in range(2)
                             for k, d in enumerate(domains)],
                "error_by_domain": dict.fromkeys(domains, 0.3), "error_by_round": [0.35 + 0.05 * i, 0.4 + 0.05 * i],
            }  # fmt: skip
            adapted = make(strategy=("cotta", "tent")[i], stream="corruptions", seed=seed, kind="adapt")
            amend(
                adapted, adaptation=table, metrics={"online_error": 0.37 + 0.05 * i + 0.01 * seed, "round_drift": 0.05}
            )
            acted = make(strategy=("wsrl", "sac")[i], stream="pendulum", seed=seed, kind="interact")
            entry = {
                "experience": "world 0", "return_bounds": [-1000.0, 0.0], "before": -200.0 + 10 * seed,
                "evaluations": [[100 * (k + 1), -300.0 + 50 * k + 10 * seed - 100 * i] for k in range(4)],
                "probe": [{"env_step": 100 * (k + 1), "q": -5.0 - k, "td_error": 0.5, "mc_return": -7.0,
                           "return_error": 2.0} for k in range(4)],
                "dip": {"depth": 0.1, "area": 0.05, "steps": 300},
            }  # fmt: skip
            amend(acted, interaction=[entry], metrics={"normalized_return": 0.8 - 0.1 * i, "initial_dip": 0.1})
    make(strategy="ewc", seed=0, status="failed")
    (root / "study").mkdir()
    (root / "study" / "sweep.json").write_text(json.dumps(STUDY))
