"""The dashboard of 200 runs of 10,000 metric points each, from the SQLite store that MLflow keeps.

The store has MLflow's own tables, filled by SQL, since sending two million points takes an hour; each run has the
parameters, tags and summary.json of a real one. All figures are seconds from nothing (there is no counterpart by hand),
in a process that has done it once; processor time stands in the note.
"""

from __future__ import annotations

import json
import math
import sqlite3
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.timing import Row, paired
from clplat.commands.dashboard import Stored
from clplat.config.resolve import resolve
from clplat.config.settings import flat
from clplat.files import to_json
from clplat.report.dashboard import leaderboard, standings_of, view
from clplat.report.dashboard_page import build_dashboard
from clplat.tracking.held import open_store
from clplat.tracking.store import KEY_TAG

STREAMS, STRATEGIES, SEEDS, STEPS, EXPERIENCES = 4, 10, 5, 2000, 10
CURVES = ("train/loss", "train/lr", "train/gradient_norm", "anytime/accuracy", "anytime/split_0")  # 10,000 points a run
READY, BOARD, PAGE = 3.0, 1.0, 5000.0  # seconds, seconds, kB


def rows(quick: bool = False) -> list[Row]:
    """Leaderboard, all data of the page, the page itself, and its size."""
    with tempfile.TemporaryDirectory() as folder:
        runs, steps, rounds = (8, 20, 1) if quick else (STREAMS * STRATEGIES * SEEDS, STEPS, 5)
        uri = make_store(Path(folder), runs, steps)
        source = Stored(open_store(uri), uri, None)
        shown = view(source)
        assert len(shown.runs) == runs
        page = build_dashboard(shown, lambda run: None, served=False)
        assert page.count("<polyline") > (0 if quick else 100)
        of = f"{runs} runs of {steps * len(CURVES)} points"
        size = [len(page.encode()) / 1e3]
        limits = (None, None, None) if quick else (BOARD, READY, PAGE)
        return [
            _row(f"leaderboard, {of}", lambda: leaderboard(standings_of(source.read()[0])), rounds, limits[0]),
            _row(f"all data of the dashboard, {of}", lambda: view(source), rounds, limits[1]),
            _row("its page of these data", lambda: build_dashboard(shown, lambda run: None, served=False), rounds),
            paired("size of that page", "kB", size, [0.0], "difference", limits[2]),
        ]


def _row(name: str, work: Callable[[], Any], rounds: int, limit: float | None = None) -> Row:
    wall, processor = [], []
    for _ in range(rounds):
        started, busy = time.perf_counter(), time.process_time()
        work()
        wall.append(time.perf_counter() - started)
        processor.append(time.process_time() - busy)
    note = f"processor time {sorted(processor)[rounds // 2]:.2f} s"
    return paired(name, "s", wall, [0.0] * rounds, "difference", limit, note)


def make_store(folder: Path, runs: int, steps: int) -> str:
    """URI of a store in `folder` with so many runs, each with `steps` points of each curve."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{folder / 'mlflow.db'}"
    experiment = MlflowClient(uri).create_experiment("clplat", artifact_location=(folder / "mlartifacts").as_uri())
    store = sqlite3.connect(folder / "mlflow.db")
    store.execute("pragma synchronous = off")
    rng, begun = np.random.default_rng(0), int(time.time() * 1000)
    for k in range(runs):
        stream, strategy, seed = k // (STRATEGIES * SEEDS), k // SEEDS % STRATEGIES, k % SEEDS
        _add(
            store, folder, int(experiment), rng, begun + 1000 * k, f"stream{stream}", f"strategy{strategy}", seed, steps
        )
    store.commit()
    store.close()
    return uri


def _add(store: sqlite3.Connection, folder: Path, experiment: int, rng: np.random.Generator, begun: int, stream: str,
         strategy: str, seed: int, steps: int) -> None:  # fmt: skip
    """One run: its facts, its curves and its summary."""
    run, summary = uuid.uuid4().hex, _summary(rng, stream, strategy, seed)
    artifacts = folder / "mlartifacts" / run / "artifacts"
    artifacts.mkdir(parents=True)
    (artifacts / "summary.json").write_text(json.dumps(summary))
    (artifacts / "report.html").write_text("")
    columns = "run_uuid, name, status, start_time, end_time, lifecycle_stage, artifact_uri, experiment_id"
    store.execute(f"insert into runs ({columns}) values (?, ?, 'FINISHED', ?, ?, 'active', ?, ?)",
                  (run, f"{strategy}-{seed}", begun, begun + 60_000, artifacts.as_uri(), experiment))  # fmt: skip
    config = flat(json.loads(to_json(resolve(strategy="er", stream="digits", seed=seed).to_dict())))
    config |= {"strategy.name": strategy, "stream.name": stream}
    params = {k: v if isinstance(v, str) else to_json(v) for k, v in config.items()}
    tags = {"strategy": strategy, "stream": stream, "seed": str(seed), "git_commit": "0" * 40, KEY_TAG: run}
    for table, values in (("params", params), ("tags", tags)):
        store.executemany(f"insert into {table} (run_uuid, key, value) values (?, ?, ?)",
                          [(run, k, v) for k, v in values.items()])  # fmt: skip
    last = {**summary["metrics"], **{f"cost/{k}": v for k, v in summary["cost"].items()}, **dict.fromkeys(CURVES, 0.5)}
    store.executemany(
        "insert into latest_metrics (run_uuid, key, value, timestamp, step, is_nan) values (?, ?, ?, ?, ?, 0)",
        [(run, k, v, begun, 50 * steps if k in CURVES else EXPERIENCES) for k, v in last.items()],
    )
    values = np.exp(-3 * np.linspace(0, 1, steps))[:, None] + 0.05 * rng.standard_normal((steps, len(CURVES)))
    store.executemany(
        "insert into metrics (run_uuid, key, value, timestamp, step, is_nan) values (?, ?, ?, ?, ?, 0)",
        ((run, key, values[i, j], begun + 10 * i, 50 * (i + 1)) for i in range(steps) for j, key in enumerate(CURVES)),
    )


def _summary(rng: np.random.Generator, stream: str, strategy: str, seed: int) -> dict[str, Any]:
    """As a run of ten experiences leaves it."""
    fade = 0.01 * (1 + int(strategy.removeprefix("strategy")))
    matrix = [[float(np.clip(0.9 * math.exp(-fade * (i - 1 - j)) if j < i else 0.1, 0, 1) + 0.01 * rng.random())
               for j in range(EXPERIENCES)] for i in range(EXPERIENCES + 1)]  # fmt: skip
    last = float(np.mean(matrix[-1]))
    metrics = {"average_accuracy": last, "forgetting": 0.9 - last, "plasticity": 0.9, "stability": last + 0.05,
               "average_anytime_accuracy": last, "worst_case_accuracy": last - 0.1, "stability_gap": fade}  # fmt: skip
    cost = {"train_seconds": 60.0 + rng.random(), "samples_per_second": 900.0, "peak_rss_bytes": 6e8,
            "stored_bytes": 5e5, "trainable_parameters": 118_282}  # fmt: skip
    names = [f"split_{j}" for j in range(EXPERIENCES)]
    return {
        "strategy": strategy, "stream": stream, "backbone": "mlp", "seed": seed, "git_commit": "0" * 40,
        "status": "complete", "accuracy_matrix": matrix, "metrics": metrics, "cost": cost,
        "experiences": [{"name": n, "kind": "learn", "train_samples": 900, "test_samples": 200} for n in names],
        "representation": {"effective_rank": [30.0] * EXPERIENCES}, "why_null": {},
    }  # fmt: skip
