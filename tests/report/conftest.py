"""Run directories of the contract's shape with made-up but plausible numbers."""

import json
import math

import numpy as np
import pytest
import yaml
from boards import furnish

# strategy → (what it forgets per later experience, seconds)
FADES = {"joint": (0.0, 61.0), "ilora": (0.02, 48.0), "er": (0.035, 21.0), "ewc": (0.12, 24.0), "naive": (0.3, 9.0)}
ALL_METRICS = (
    "average_accuracy", "average_incremental_accuracy", "forgetting", "backward_transfer", "forward_transfer",
    "plasticity", "stability", "average_anytime_accuracy", "worst_case_accuracy", "forget_accuracy", "retain_accuracy",
    "h_mean", "online_error", "normalized_return", "initial_dip",
)  # fmt: skip


def make_summary(
    strategy="er", stream="digits", backbone="mlp", seed=0, experiences=5, status="complete", kind="learn"
):
    """A summary.json; an interrupted run has done 2 experiences."""
    rng = np.random.default_rng([seed, len(strategy) + sum(map(ord, strategy))])
    fade, seconds = FADES.get(strategy, (0.1, 30.0))
    done = experiences if status == "complete" else min(2, experiences)
    start = 0.93 + 0.02 * rng.standard_normal(experiences)
    matrix = []
    for i in range(done + 1):
        row = [start[j] * math.exp(-fade * (i - 1 - j)) if j < i else 0.1 for j in range(experiences)]
        matrix.append([float(np.clip(v + 0.008 * rng.standard_normal(), 0, 1)) for v in row])
    last = matrix[-1][:done]
    measured = {
        "average_accuracy": np.mean(last),
        "average_incremental_accuracy": np.mean([np.mean(matrix[i][:i]) for i in range(1, done + 1)]),
        "forgetting": np.mean([matrix[j + 1][j] - last[j] for j in range(done - 1)]),
        "backward_transfer": np.mean([last[j] - matrix[j + 1][j] for j in range(done - 1)]),
        "plasticity": np.mean([matrix[j + 1][j] for j in range(done)]),
        "stability": 1 - np.mean([abs(matrix[j + 1][j] - last[j]) for j in range(done - 1)]),
        "average_anytime_accuracy": np.mean(last) - 0.02,
        "worst_case_accuracy": min(last),
    }
    metrics = {name: float(measured[name]) if name in measured else None for name in ALL_METRICS}
    noise = 1 + 0.05 * rng.standard_normal(4)
    return {
        "clplat": "0.1.0", "strategy": strategy, "stream": stream, "backbone": backbone, "seed": seed,
        "config_sha256": "0" * 64, "git_commit": "89abcdef0123456789abcdef0123456789abcdef", "status": status,
        "experiences": [{"name": f"digits {2 * j}, {2 * j + 1}", "kind": kind, "train_samples": 11_520 + 37 * j,
                         "test_samples": 1_940 + 11 * j} for j in range(experiences)],
        "accuracy_matrix": matrix,
        "metrics": metrics,
        "representation": {"dormant_fraction": [0.02 * (i + 1) * (1 + fade) for i in range(done)],
                           "effective_rank": [31.0 - 2.2 * i - 10 * fade for i in range(done)],
                           "weight_norm": [14.0 + 1.7 * i for i in range(done)],
                           "gradient_norm": [1.2 / (i + 1) for i in range(done)]},
        "cost": {"train_seconds": seconds * noise[0], "eval_seconds": 2.1 * noise[1],
                 "samples_per_second": 58_000 / seconds * noise[2], "first_step_seconds": 0.31 * noise[3],
                 "peak_rss_bytes": int(6.1e8 + 1e7 * seed), "peak_device_bytes": None, "trainable_parameters": 118_282,
                 "stored_bytes": 627_200 if strategy == "er" else 0, "train_flops": None},
        "why_null": {**{name: f"the stream has no experience that {name} needs" for name in ALL_METRICS
                        if name not in measured},
                     "peak_device_bytes": "ran on the CPU", "train_flops": "not counted for this backbone"},
    }  # fmt: skip


def make_config(summary, **options):
    """A config.yaml for a summary."""
    return {
        "strategy": {"name": summary["strategy"], "lr": 0.05, **options},
        "stream": {"name": summary["stream"], "experiences": len(summary["experiences"]), "seed": summary["seed"]},
        "backbone": {"name": summary["backbone"], "width": 128}, "head": {"name": "growing"},
        "loop": {"max_epochs": 2, "batch_size": 32, "evaluate_on": "test"},
        "fabric": {"accelerator": "cpu", "devices": 1}, "tracking": {"enabled": True, "uri": None},
        "seed": summary["seed"], "name": None, "output": "runs",
    }  # fmt: skip


def make_log(summary, every=40, steps=360):
    """Lines of metrics.jsonl."""
    lines, step = [], 0
    rng = np.random.default_rng(summary["seed"])
    matrix = summary["accuracy_matrix"]
    for i in range(1, len(matrix)):
        for k in range(every, steps + 1, every):
            share, step = k / steps, step + every
            now = (1 - share) * np.mean(matrix[i - 1][:i]) + share * np.mean(matrix[i][:i])
            dip = 0.06 * math.exp(-6 * share)
            lines.append({"axis": "step", "step": step, "time": 1.7e9 + step, "metrics": {
                "anytime/accuracy": float(now - dip + 0.004 * rng.standard_normal()),
                "train/loss": float(1.6 * math.exp(-4 * share) + 0.15 + 0.02 * rng.standard_normal()), "train/lr": 0.05,
            }})  # fmt: skip
        lines.append({"axis": "experience", "step": i, "time": 1.7e9 + step,
                      "metrics": {"average_accuracy": float(np.mean(matrix[i][:i]))}})  # fmt: skip
    return "".join(json.dumps(line) + "\n" for line in lines)


def make_run(base, *, log=True, options=None, **facts):
    """A run directory in `base`."""
    summary = make_summary(**facts)
    folder = base / f"{len(list(base.glob('*'))):03d}-{summary['seed']}"
    folder.mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(summary))
    (folder / "config.yaml").write_text(yaml.safe_dump(make_config(summary, **(options or {}))))
    if log:
        (folder / "metrics.jsonl").write_text(make_log(summary))
    return folder


@pytest.fixture
def fabricate(tmp_path):
    """Factory of run directories: `fabricate(strategy=..., seed=..., log=True, options={...})` → path."""
    return lambda root=None, **facts: make_run(root or tmp_path / "runs", **facts)


@pytest.fixture(scope="module")
def all_kinds(tmp_path_factory):
    """Folder of runs with something for every panel, a run that failed, and a study."""
    root = tmp_path_factory.mktemp("all")
    furnish(lambda **facts: make_run(root, **facts), root)
    return root
