"""Hyper-parameter search: an Optuna study that any number of processes on any number of machines may work on.

A sweep is a run configuration with a `sweep:` section. Every trial is evaluated on validation data, so test labels
never reach the choice. The default configuration is the first trial: the study says what tuning gained over it.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from clplat.errors import Interrupted, UserError
from clplat.launchers.choice import chosen
from clplat.run.state import Watch
from clplat.sweep import tracked
from clplat.sweep.conclude import SweepResult, conclude
from clplat.sweep.early import Run
from clplat.sweep.figures import draw
from clplat.sweep.plan import Plan, read_plan
from clplat.sweep.progress import Progress
from clplat.sweep.store import open_study, storage_faults
from clplat.sweep.trials import enqueue, work
from clplat.sweep.workers import employ


def sweep(
    config: str | Path | None = None,
    keys: Sequence[str] = (),
    *,
    trials: int | None = None,
    workers: int = 1,
    join: bool = False,
    run: Run | None = None,
    quiet: bool = False,
    launcher: str = "local",
    resources: Mapping[str, Any] | Sequence[str] = (),
) -> SweepResult:
    """Work on a study until it has all its trials, then write best.yaml and sweep.json.

    Args:
        config: YAML file with a `sweep:` section, or the name of a shipped experiment that has one; None takes all from
            `keys`, and searches what the strategy declares.
        keys: flags that override the configuration in every trial, `["--loop.max_epochs", "2"]`, or its section,
            `["--sweep.sampler", "tpe"]`.
        trials: in the whole study, ≥ 1; instead of `sweep.trials`.
        workers: at a time, ≥ 1.
        join: the study must exist already (a guard against a mistyped name or storage).
        run: what performs a run; None is `clplat.api`. With several workers it must be picklable.
        quiet: print nothing.
        launcher: where they work: in processes here, as an array of jobs (slurm), or as tasks of a cluster (ray).
        resources: of each worker, as the launcher calls them: `{"num_gpus": 1}`, or `["num_gpus=1"]`.

    Raises:
        UserError: one line for each fault of the configuration; or no trial succeeded.
        MissingError: data or weights are not there.
        Interrupted, KeyboardInterrupt: the trials under way are given back; the same command goes on.
    """
    launch = chosen(launcher, workers, resources, "workers")
    alone = workers == 1 and launcher == "local"
    plan = _plan(config, keys, trials, quiet)
    if own := run is None:
        run = functools.partial(perform, plan.keys, study=plan.folder)
        from clplat.sweep.check import check

        check(plan, plan.keys)
    default = default_of(plan)
    queue = _queue(plan, default)
    study = open_study(plan, plan.seed if alone and not join else None, must_exist=join)
    with storage_faults(plan, opened=True):
        plan.folder.mkdir(parents=True, exist_ok=True)
        for name, wanted in queue.items():
            enqueue(study, plan, wanted, name, default=wanted == default)
        try:
            with Progress(study, plan, quiet) as progress:
                if alone:
                    work(study, plan, run, progress.update)
                else:
                    employ(study, plan, workers, run, launch, progress.update)
                progress.update()
        except Interrupted as error:
            raise Interrupted(*error.faults, "sweep: the same command goes on with the study") from None
        if not own:
            return conclude(study, plan, quiet, run)
        return _concluded(study, plan, quiet, run)


def _concluded(study: Any, plan: Plan, quiet: bool, run: Run) -> SweepResult:
    """What was found, its figures, and all of it in MLflow."""
    try:
        result = conclude(study, plan, quiet, run)
    except UserError:  # no trial succeeded
        tracked.end(study, plan, None)
        raise
    draw(study, plan)
    best = next(t["values"] for t in result.trials if t["params"] == result.best_params and t["values"])
    note = tracked.end(study, plan, dict(zip(plan.metrics, best, strict=True)))
    if note and not quiet:
        print(f"clplat: {note}", file=sys.stderr, flush=True)
    return result


def _plan(config: str | Path | None, keys: Sequence[str], trials: int | None, quiet: bool) -> Plan:
    if config is not None:
        return read_plan(config, keys, trials)
    from clplat.sweep.unwritten import plan_of_flags

    plan, notes = plan_of_flags(keys, trials)
    if not quiet:
        print("\n".join(notes), flush=True)
    return plan


def perform(
    keys: Sequence[str], config: dict[str, Any], run_dir: Path, watch: Watch | None = None, study: Path | None = None
) -> Mapping[str, Any]:  # fmt: skip
    """One run of a trial: begun, resumed where a dead worker left it, or already complete.

    Args:
        study: its folder, under whose run in MLflow this one is nested; None: under none.
    """
    from clplat.config.resolve import resolve
    from clplat.run.launch import launch

    with contextlib.suppress(FileNotFoundError, ValueError):
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        if summary["status"] == "complete":
            return summary
    if (run_dir / "config.yaml").is_file():
        return launch(resolve(config=run_dir / "config.yaml"), run_dir, quiet=True, resumed=True, watch=watch).summary
    resolved = resolve(argv=list(keys), config=config)
    resolved.tracking.model = bool(resolved.tracking.model)  # many, on validation data: unless it is asked for
    if study is not None:
        tracked.begin(study, run_dir, resolved)
    return launch(resolved, run_dir, quiet=True, watch=watch).summary


def default_of(plan: Plan) -> dict[str, Any] | None:
    """Value of each searched key where nothing is searched; None where one has no default."""
    from clplat.config.resolve import resolve
    from clplat.config.settings import flat

    try:
        resolved = resolve(argv=plan.keys, config=plan.config({}, plan.seeds[0], "default"))
    except UserError:
        return None
    known = flat(resolved.to_dict()) | {p: getattr(resolved, p).name for p in ("strategy", "backbone", "head", "merge")}
    return {key: known[key] for key in plan.space} if plan.space.keys() <= known.keys() else None


def _queue(plan: Plan, default: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """What is tried before anything is drawn: the default first; then, of a grid, all its points."""
    queue = {} if default is None else {"default": default}
    if plan.sampler == "grid":
        spans = [span.values() or [] for span in plan.space.values()]
        points = [dict(zip(plan.space, point, strict=True)) for point in itertools.product(*spans)]
        queue |= {f"grid-{i}": point for i, point in enumerate(p for p in points if p != default)}
        plan.trials = min(plan.trials, len(queue))
    return dict(itertools.islice(queue.items(), plan.trials))
