"""Trials of a study: taken, run, told, and given back where their worker died or was stopped.

A trial says in its attributes who works on it (`worker`), when that last showed that it lives (`beat`), where its runs
are (`folder`), and how often it was repeated. One whose worker is gone is failed by whoever notices first, and queued
again with the same values in the same folder, where its run goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from clplat.errors import Interrupted, MissingError
from clplat.sweep.early import GivenUp, Run, hopeless, means, watched
from clplat.sweep.objectives import values_of
from clplat.sweep.owners import is_called, is_gone, me
from clplat.sweep.plan import Plan
from clplat.sweep.server import storage_errors

MAX_REPEATS = 3  # of a trial whose worker died
POLL = 0.5  # seconds between two looks at the study while there is nothing to take
UNOWNED = 10.0  # seconds after which what lasts an instant was left by a worker that died: a trial without its name


def work(study: Any, plan: Plan, run: Run, told: Callable[[], None] = lambda: None, badge: str = "") -> None:
    """Take trials until the study has all of them, and wait for those of other workers: one may die.

    Args:
        told: called when a trial has ended here.
        badge: of a worker that was given out, and may be again when its process is lost.
    """
    reap, parent = Reaper(study, plan), multiprocessing.parent_process()
    reap.left_by(me())  # by an earlier call here, whose storage went away
    if badge:
        reap.left_by(badge, counted=True)  # by a process that was lost
    while parent is None or parent.is_alive():
        reap()
        trials = study.get_trials(deepcopy=False)
        if is_done(trials, plan):
            return
        if not any(t.state.name == "WAITING" for t in trials) and sum(map(counts, trials)) >= plan.trials:
            time.sleep(POLL)
            continue
        trial = study.ask()
        trial.set_user_attr("worker", me(badge))
        earlier = study.get_trials(deepcopy=False)[: trial.number]
        if _is_double(trial, earlier):
            give_up(study, trial)
        elif sum(map(counts, earlier)) >= plan.trials and "repeat_of" not in trial.user_attrs:
            give_up(study, trial)  # another worker took the last one at the same time
        else:
            _attempt(study, trial, plan, run)
            told()


def is_done(trials: list[Any], plan: Plan) -> bool:
    """Whether a study has all its trials."""
    return sum(map(finished, trials)) >= plan.trials


def finished(trial: Any) -> bool:
    """Has a value, was stopped early, failed by itself, or took too many workers with it."""
    name, attrs = trial.state.name, trial.user_attrs
    if name == "FAIL":
        return "reason" in attrs or (attrs.get("repeats", 0) >= MAX_REPEATS and "given_back" not in attrs)
    return name in ("COMPLETE", "PRUNED")


def counts(trial: Any) -> bool:
    """Whether a trial is one of the study's."""
    return finished(trial) or trial.state.name in ("RUNNING", "WAITING")


def values(trial: Any) -> dict[str, Any]:
    """Searched key → value. Those of a queued trial may lie outside the space."""
    return {**trial.params, **trial.user_attrs.get("fixed", {})}


def _is_double(trial: Any, earlier: list[Any]) -> bool:
    """Whether a queued trial was queued twice: by two commands at the same time, or by one whose server went away."""
    queued, of = (trial.user_attrs.get(k) for k in ("queued", "repeat_of"))
    return any(
        (queued is not None and t.user_attrs.get("queued") == queued and counts(t))
        or (of is not None and t.user_attrs.get("repeat_of") == of)
        for t in earlier
    )


def give_up(study: Any, trial: Any) -> None:
    """End a trial as one that the study does not count, and nobody repeats."""
    trial.set_user_attr("given_back", True)
    trial.set_user_attr("surplus", True)
    tell(study, trial.number, None)


def enqueue(study: Any, plan: Plan, wanted: Mapping[str, Any], queued: str, **attrs: Any) -> None:
    """Queue a trial of these values, unless there is one of the same name `queued`."""
    import optuna

    if any(t.user_attrs.get("queued") == queued for t in study.get_trials(deepcopy=False)):
        return
    inside = {key: value for key, value in wanted.items() if plan.space[key].holds(value)}
    fixed = {key: value for key, value in wanted.items() if key not in inside}
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING,
            params=inside,
            distributions={key: plan.space[key].distribution() for key in inside},
            user_attrs={**attrs, "queued": queued, **({"fixed": fixed} if fixed else {})},
        )
    )


def _attempt(study: Any, trial: Any, plan: Plan, run: Run) -> None:
    fixed = trial.user_attrs.get("fixed", {})
    for key, span in plan.space.items():
        if key not in fixed:
            span.suggest(trial, key)
    if (twin := _twin(study, trial)) is not None:
        trial.set_user_attr("folder", twin.user_attrs["folder"])
        trial.set_user_attr("same_as", twin.number)
        tell(study, trial.number, list(twin.values))
        return
    folder = trial.user_attrs.get("folder", f"trial-{trial.number:04d}")
    trial.set_user_attr("folder", folder)
    found: list[float] | None = None
    try:
        with _beating(trial, plan.grace_seconds / 4):
            found = _evaluate(study, trial, plan, folder, run)
    except (Interrupted, KeyboardInterrupt, MissingError, SystemExit):
        trial.set_user_attr("given_back", True)
        give_back(study, trial.number, counted=False)
        raise
    except GivenUp as why:
        trial.set_user_attr("stopped", str(why))
        if why.cost:
            trial.set_user_attr("spent", _spent(why.cost))
    except storage_errors():
        raise  # no fault of the trial's
    except Exception as error:  # noqa: BLE001 - one bad combination must not end the search
        trial.set_user_attr("reason", f"{type(error).__name__}: {' '.join(str(error).split())}"[:500])
    tell(study, trial.number, found, stopped="stopped" in trial.user_attrs)


def _twin(study: Any, trial: Any) -> Any:
    """A trial that has a value for the very same hyper-parameters, or None: same seeds, same data, same result."""
    done = (t for t in study.get_trials(deepcopy=False) if t.state.name == "COMPLETE" and t.number != trial.number)
    return next((t for t in done if values(t) == values(trial) and "folder" in t.user_attrs), None)


def _evaluate(study: Any, trial: Any, plan: Plan, folder: str, run: Run) -> list[float]:
    """Mean of each metric over the seeds and streams, on validation data; notes in the trial what it took.

    Raises:
        GivenUp: it falls behind; the default, which others are compared with, never does.
    """
    rows: list[list[float]] = []
    spent: dict[str, float] = {}
    for stream, seed, place in plan.cells():
        config = plan.config(values(trial), seed, folder, stream)
        summary = watched(trial, plan, run, config, plan.folder / folder / place, first=not rows)
        spent = {k: v + spent.get(k, 0) for k, v in _spent(summary.get("cost", {})).items()}
        rows.append(values_of(summary, plan.metrics))
        trial.set_user_attr("spent", spent)
        trial.set_user_attr("rows", rows)
        if not trial.user_attrs.get("default") and (why := hopeless(study, plan, rows)):
            raise GivenUp(why)
    return means(rows)


def _spent(cost: Mapping[str, Any]) -> dict[str, float]:
    """What one run took."""
    seconds = sum(cost.get(k) or 0.0 for k in ("train_seconds", "eval_seconds"))
    return {"runs": 1, "seconds": seconds, "flops": cost.get("train_flops") or 0.0}


def tell(study: Any, number: int, found: list[float] | None, *, stopped: bool = False) -> bool:
    """End a trial; False if another worker has ended it already.

    Args:
        found: None: it has no figure, since it failed or was stopped early.
    """
    from optuna.exceptions import UpdateFinishedTrialError
    from optuna.trial import TrialState

    try:
        state = TrialState.COMPLETE if found is not None else TrialState.PRUNED if stopped else TrialState.FAIL
        study.tell(number, found, state=state)
    except (ValueError, RuntimeError, UpdateFinishedTrialError):
        return False
    return True


def give_back(study: Any, number: int, *, counted: bool) -> bool:
    """Fail a trial and queue it again with the same values and folder; False if another has ended it already.

    Args:
        counted: whether it took its worker with it, which is let happen `MAX_REPEATS` times.
    """
    if not tell(study, number, None):
        return False
    _queue_again(study, study.get_trials(deepcopy=False)[number], counted)
    return True


def _queue_again(study: Any, old: Any, counted: bool) -> None:
    import optuna

    repeats = old.user_attrs.get("repeats", 0) + counted
    if repeats > MAX_REPEATS:
        return
    attrs = {
        k: v for k, v in old.user_attrs.items() if k not in ("worker", "beat", "queued", "given_back", "spent", "rows")
    }
    study.add_trial(
        optuna.create_trial(
            state=optuna.trial.TrialState.WAITING, params=old.params, distributions=old.distributions,
            user_attrs={**attrs, "repeats": repeats, "repeat_of": old.number},
        )
    )  # fmt: skip


def _wants_repeat(trial: Any) -> bool:
    """Whether a trial has failed and is to be queued again."""
    return trial.state.name == "FAIL" and not finished(trial) and "surplus" not in trial.user_attrs


class Reaper:
    """Gives back the trials of workers that are gone: at once on this machine, by their silence on another."""

    def __init__(self, study: Any, plan: Plan) -> None:
        self.study, self.grace = study, plan.grace_seconds
        self.doubtful: dict[int, float] = {}  # trial → when it was first seen without an owner, or without its repeat

    def __call__(self) -> int:
        """How many were given back."""
        trials = self.study.get_trials(deepcopy=False)
        repeated = {t.user_attrs.get("repeat_of") for t in trials}
        running = [t for t in trials if t.state.name == "RUNNING"]
        lost = [t for t in trials if t.number not in repeated and _wants_repeat(t)]
        doubtful = [t.number for t in running if "worker" not in t.user_attrs] + [t.number for t in lost]
        self.doubtful = {number: self.doubtful.get(number, time.monotonic()) for number in doubtful}
        for trial in lost:  # who failed it died before the next step
            if time.monotonic() - self.doubtful[trial.number] > UNOWNED:
                _queue_again(self.study, trial, "given_back" not in trial.user_attrs)
        return sum(give_back(self.study, t.number, counted=True) for t in running if self._is_left(t))

    def left_by(self, name: str, *, counted: bool = False) -> None:
        """Give back the trials of a worker that is known to have none under way.

        Args:
            name: of the worker, or its badge.
            counted: as in `give_back`.
        """
        for trial in self.study.get_trials(deepcopy=False):
            if trial.state.name == "RUNNING" and is_called(trial.user_attrs.get("worker", ""), name):
                give_back(self.study, trial.number, counted=counted)

    def _is_left(self, trial: Any) -> bool:
        owner = trial.user_attrs.get("worker")
        if owner is None:
            return time.monotonic() - self.doubtful[trial.number] > UNOWNED
        beat = max(trial.user_attrs.get("beat", 0.0), trial.datetime_start.timestamp())
        return is_gone(owner) or time.time() - beat > self.grace


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
