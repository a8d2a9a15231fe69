"""Hyper-parameter search: an Optuna study that any number of processes on any number of machines may work on.

A sweep is a run configuration with a `sweep:` section. Every trial is evaluated on validation data, so test labels
never reach the choice. A worker shows that it lives by a beat in the study; the trial of one that died is failed by
whoever notices first and repeated with the same values in the same run folder, where it resumes.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clplat.errors import Interrupted, MissingError, UserError
from clplat.files import to_json, write_atomic
from clplat.sweep.plan import Plan, nested, read_plan

MAX_REPEATS = 2  # of a trial whose worker died
GP_TRIALS = 50  # the Gaussian process is better up to about this many trials, and costs 0.5 s for each

Run = Callable[[dict[str, Any], Path], Mapping[str, Any]]
"""A run: (configuration in the layout of config.yaml, its folder) → contents of summary.json."""


@dataclass(frozen=True)
class SweepResult:
    """What a search found.

    Args:
        best_value: of the metric on validation data, averaged over the seeds.
        best_params: configuration key → value.
        best_config: best.yaml, a configuration to run.
        trials: all of them, as in sweep.json.
        folder: of the study: best.yaml, sweep.json and a folder for each trial.
    """

    best_value: float
    best_params: dict[str, Any]
    best_config: Path
    trials: list[dict[str, Any]]
    folder: Path


def sweep(
    config: str | Path,
    keys: Sequence[str] = (),
    *,
    trials: int | None = None,
    workers: int = 1,
    join: bool = False,
    run: Run | None = None,
    quiet: bool = False,
) -> SweepResult:
    """Work on a study until it has all its trials, then write best.yaml and sweep.json.

    Args:
        config: YAML file with a `sweep:` section, or the name of a shipped experiment that has one.
        keys: flags that override the configuration in every trial, `["--loop.max_epochs", "2"]`.
        trials: in the whole study, ≥ 1; instead of `sweep.trials`.
        workers: processes here, ≥ 1.
        join: the study must exist already (a guard against a mistyped name or storage).
        run: what performs a run; None is `clplat.api`. With several workers it must be picklable.
        quiet: print nothing.

    Raises:
        UserError: one line for each fault of the configuration; or no trial succeeded.
        MissingError: data or weights are not there.
        Interrupted, KeyboardInterrupt: the trial under way is given back; the same command goes on.
    """
    plan = read_plan(config, keys, trials)
    if workers < 1:
        raise UserError(f"workers: {workers} is out of range (valid: ≥ 1)")
    if run is None:
        run = functools.partial(perform, list(keys))
        from clplat.sweep.check import check

        check(plan, keys)
    plan.folder.mkdir(parents=True, exist_ok=True)
    study = open_study(plan, plan.seed if workers == 1 and not join else None, must_exist=join)
    with _further_workers(plan, workers - 1, run, quiet):
        try:
            work(study, plan, run, quiet)
        except Interrupted as error:
            raise Interrupted(*error.faults, "sweep: the same command goes on with the study") from None
    return _conclude(study, plan, quiet)


def perform(keys: Sequence[str], config: dict[str, Any], run_dir: Path) -> Mapping[str, Any]:
    """One run of a trial: begun, resumed where a dead worker left it, or already complete."""
    from clplat import api
    from clplat.config.resolve import resolve

    with contextlib.suppress(FileNotFoundError, ValueError):
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
        if summary["status"] == "complete":
            return summary
    if (run_dir / "config.yaml").is_file():
        return api.resume(run_dir, quiet=True).summary
    resolved = resolve(argv=list(keys), config=config)
    return api.run_config(resolved, quiet=True, run_dir=run_dir, report=False).summary


# --- the study ----------------------------------------------------------------------------------------------------


def open_study(plan: Plan, seed: int | None, *, must_exist: bool = False) -> Any:
    """The study, made if missing. `seed` None draws one: workers that share a seed would try the same values."""
    import optuna
    from optuna.storages import JournalStorage, RDBStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    if "://" in plan.storage:
        storage: Any = RDBStorage(plan.storage)
    else:
        Path(plan.storage).parent.mkdir(parents=True, exist_ok=True)
        storage = JournalStorage(JournalFileBackend(plan.storage))
    if must_exist and plan.study not in optuna.study.get_all_study_names(storage):
        raise UserError(f"sweep.study: no study {plan.study!r} in {plan.storage} to join (start it without --join)")
    study = optuna.create_study(study_name=plan.study, storage=storage, direction=plan.direction, load_if_exists=True)
    # A study that goes on must not draw the values of its beginning again.
    study.sampler = _sampler(plan, None if seed is None else seed + len(study.get_trials(deepcopy=False)))
    digest = hashlib.sha256(plan.identity().encode()).hexdigest()
    if study.user_attrs.get("identity", digest) != digest:
        raise UserError(
            f"sweep.study: {plan.study!r} in {plan.storage} has another configuration or space (give another name)"
        )
    study.set_user_attr("identity", digest)
    return study


def _sampler(plan: Plan, seed: int | None) -> Any:
    from optuna import samplers

    kind = plan.sampler
    if kind == "auto":
        kind = "gp" if plan.trials <= GP_TRIALS else "tpe"
    if kind == "random":
        return samplers.RandomSampler(seed=seed)
    if kind == "gp":
        return samplers.GPSampler(seed=seed, deterministic_objective=False)
    return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)


def work(study: Any, plan: Plan, run: Run, quiet: bool) -> None:
    """Take trials until the study has all of them, and wait for those of other workers: one may die."""
    while True:
        _reap(study, plan.grace_seconds)
        trials = study.get_trials(deepcopy=False)
        if sum(map(_finished, trials)) >= plan.trials:
            return
        queued = any(t.state.name == "WAITING" for t in trials)
        if not queued and sum(map(_counts, trials)) >= plan.trials:
            time.sleep(min(plan.grace_seconds / 4, 5.0))
            continue
        trial = study.ask(plan.distributions())
        earlier = study.get_trials(deepcopy=False)[: trial.number]
        if sum(map(_counts, earlier)) >= plan.trials:  # another worker took the last one at the same time
            _tell(study, trial.number, None)
            continue
        _attempt(study, trial, plan, run, quiet)


def _finished(trial: Any) -> bool:
    """Has a value, failed by itself, or took too many workers with it."""
    name, attrs = trial.state.name, trial.user_attrs
    return name == "COMPLETE" or (name == "FAIL" and ("reason" in attrs or attrs.get("repeats", 0) >= MAX_REPEATS))


def _counts(trial: Any) -> bool:
    return _finished(trial) or trial.state.name in ("RUNNING", "WAITING")


def _attempt(study: Any, trial: Any, plan: Plan, run: Run, quiet: bool) -> None:
    if (twin := _twin(study, trial)) is not None:
        trial.set_user_attr("folder", twin.user_attrs["folder"])
        trial.set_user_attr("same_as", twin.number)
        if _tell(study, trial.number, twin.value) and not quiet:
            said = f"{plan.metric} {twin.value:.4f} (the values of trial {twin.number}: not run again)"
            print(f"trial {trial.number}: {said}  {_show(trial.params)}", flush=True)
        return
    folder = trial.user_attrs.get("folder", f"trial-{trial.number:04d}")
    trial.set_user_attr("folder", folder)
    value, reason = None, ""
    try:
        with _beating(trial, plan.grace_seconds / 4):
            value = _evaluate(plan, trial.params, folder, run)
    except (Interrupted, KeyboardInterrupt, MissingError, SystemExit):
        if _tell(study, trial.number, None):
            _repeat(study, trial.number, counted=False)
        raise
    except Exception as error:  # noqa: BLE001 - one bad combination must not end the search
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
    if reason:
        trial.set_user_attr("reason", reason)
    if _tell(study, trial.number, value) and not quiet:
        shown = f"{plan.metric} {value:.4f}" if value is not None else f"failed ({reason})"
        print(f"trial {trial.number}: {shown}  {_show(trial.params)}", flush=True)


def _twin(study: Any, trial: Any) -> Any:
    """A trial that has a value for the very same hyper-parameters, or None: same seeds, same data, same result."""
    done = (t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE" and t.number != trial.number)
    return next((t for t in done if t.params == trial.params and "folder" in t.user_attrs), None)


def _evaluate(plan: Plan, params: Mapping[str, Any], folder: str, run: Run) -> float:
    """Mean of the metric over the seeds, on validation data."""
    values = []
    for seed in plan.seeds:
        summary = run(plan.config(params, seed, folder), plan.folder / folder / f"seed-{seed}")
        value = summary["metrics"].get(plan.metric)
        if value is None or not math.isfinite(value):
            raise ValueError(
                f"{plan.metric} is {value}: {summary.get('why_null', {}).get(plan.metric, 'not measured')}"
            )
        values.append(float(value))
    return sum(values) / len(values)


def _tell(study: Any, number: int, value: float | None) -> bool:
    """End a trial; False if another worker has ended it already."""
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        study.tell(number, value, state=TrialState.FAIL if value is None else TrialState.COMPLETE)
    except (ValueError, RuntimeError, UpdateFinishedTrialError):
        return False
    return True


def _repeat(study: Any, number: int, *, counted: bool) -> None:
    """Queue a trial again with the same values and folder."""
    import optuna

    old = study.get_trials(deepcopy=False)[number]
    repeats = old.user_attrs.get("repeats", 0) + counted
    if repeats > MAX_REPEATS:
        return
    attrs = {**old.user_attrs, "repeats": repeats, "repeat_of": number}
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING, params=old.params, distributions=old.distributions, user_attrs=attrs
        )
    )


def _reap(study: Any, grace_seconds: float) -> None:
    """Fail and repeat the trials of workers that have given no sign of life for `grace_seconds`."""
    for trial in study.get_trials(deepcopy=False):
        if trial.state.name != "RUNNING":
            continue
        # A repeated trial inherits the dead worker's beat: its own start counts too.
        beat = max(trial.user_attrs.get("beat", 0.0), trial.datetime_start.timestamp())
        if time.time() - beat > grace_seconds and _tell(study, trial.number, None):
            _repeat(study, trial.number, counted=True)


@contextlib.contextmanager
def _beating(trial: Any, seconds: float) -> Iterator[None]:
    """Show in the study every `seconds` that this worker lives."""
    stop = threading.Event()

    def beat() -> None:
        while not stop.is_set():
            with contextlib.suppress(Exception):  # the storage may be away for a while, or the trial reaped
                trial.set_user_attr("beat", time.time())
            stop.wait(seconds)

    thread = threading.Thread(target=beat, name="clplat-sweep-beat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


@contextlib.contextmanager
def _further_workers(plan: Plan, count: int, run: Run, quiet: bool) -> Iterator[None]:
    import multiprocessing

    context = multiprocessing.get_context("spawn")  # a fork would copy whatever threads this process has
    processes = [context.Process(target=_worker, args=(plan, run, quiet)) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
        for process in processes:
            process.join()
            if process.exitcode:
                print(f"clplat: a worker ended with exit code {process.exitcode}; others did its part", file=sys.stderr)
    finally:
        for process in processes:
            process.terminate()  # SIGTERM: a run under way writes its checkpoint and is given back
            process.join()


def _worker(plan: Plan, run: Run, quiet: bool) -> None:
    with contextlib.suppress(KeyboardInterrupt, Interrupted):
        work(open_study(plan, None), plan, run, quiet)


# --- the end ------------------------------------------------------------------------------------------------------


def _conclude(study: Any, plan: Plan, quiet: bool) -> SweepResult:
    import yaml

    trials = [_row(t, plan) for t in study.get_trials(deepcopy=False)]
    complete = [t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE"]
    if not complete:
        reasons = dict.fromkeys(t["reason"] for t in trials if t["reason"])
        raise UserError(f"sweep: none of {len(trials)} trials succeeded: {'; '.join(reasons) or 'their workers died'}")
    best = study.best_trial
    chosen = nested(plan.base, best.params)
    head = (
        f"# Best of {len(complete)} trials of study {plan.study}: {plan.metric} {best.value:.4f} on validation data.\n"
    )
    path = plan.folder / "best.yaml"
    write_atomic(path, head + yaml.safe_dump(copy.deepcopy(chosen), sort_keys=False, allow_unicode=True))
    facts = {"study": plan.study, "metric": plan.metric, "direction": plan.direction, "evaluated_on": "valid",
             "seeds": plan.seeds, "best": {"number": best.number, "value": best.value, "params": best.params},
             "trials": trials}  # fmt: skip
    write_atomic(plan.folder / "sweep.json", to_json(facts, indent=1))
    if not quiet:
        print(f"best of {len(complete)}: trial {best.number}, {plan.metric} {best.value:.4f}  {_show(best.params)}")
        print(f"run it: clplat run {path}", flush=True)
    return SweepResult(best.value, dict(best.params), path, trials, plan.folder)


def _row(trial: Any, plan: Plan) -> dict[str, Any]:
    folder = trial.user_attrs.get("folder")
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": trial.value,
        "params": trial.params,
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "folder": str(plan.folder / folder) if folder else None,
        "repeat_of": trial.user_attrs.get("repeat_of"),
        "reason": trial.user_attrs.get("reason"),
    }


def _show(params: Mapping[str, Any]) -> str:
    return "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items())
