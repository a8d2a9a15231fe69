"""The study in its storage: opened, or refused in one line; its sampler and pruner."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from clplat.errors import MissingError, UserError
from clplat.sweep.plan import Plan
from clplat.sweep.server import cause_of, open_database, storage_errors, without_password

_VALID = "(valid: a journal file, or a database URL as sqlite:///study.db or postgresql://user@host/database)"
GP_TRIALS = 50  # the Gaussian process is better up to about this many trials, and costs 0.5 s for each


def open_study(plan: Plan, seed: int | None, *, must_exist: bool = False) -> Any:
    """The study, made if missing.

    Args:
        seed: of the sampler; None draws one: workers that share a seed would try the same values.
        must_exist: refuse to make it.

    Raises:
        UserError: the storage can't be used, or holds a study of this name with another plan.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)  # its warnings are about speed, and greenlet
    shown = without_password(plan.storage)
    with storage_faults(plan):
        storage = _storage(plan.storage)
        if must_exist and plan.study not in optuna.study.get_all_study_names(storage):
            raise UserError(f"sweep.study: no study {plan.study!r} in {shown} to join (start it without --join)")
        directions: Any = plan.directions
        study = optuna.create_study(study_name=plan.study, storage=storage, directions=directions, load_if_exists=True)
        trials = study.get_trials(deepcopy=False)
        digest = hashlib.sha256(plan.identity().encode()).hexdigest()
        known = study.user_attrs.get("identity", None if trials else digest)
        where = f"sweep.study: {plan.study!r} in {shown}"
        if known is None:
            raise UserError(f"{where} holds {len(trials)} trials that no sweep made (give another name)")
        if known != digest:
            raise UserError(f"{where} has another configuration or space (give another name)")
        study.set_user_attr("identity", digest)
    # A study that goes on must not draw the values of its beginning again.
    study.sampler = _sampler(plan, None if seed is None else seed + len(trials))
    study.pruner = _pruner(plan)
    return study


@contextlib.contextmanager
def storage_faults(plan: Plan, *, opened: bool = False) -> Iterator[None]:
    """Tell in one line why a storage can't be used.

    Args:
        opened: only what the database says counts; other errors are not the storage's.

    Raises:
        UserError: it is missing, locked, not reachable, or none.
        MissingError: its driver is not installed.
    """
    where = f"sweep.storage: {without_password(plan.storage)!r}"
    try:
        yield
    except storage_errors() as error:
        cause = cause_of(error)
        text = without_password(" ".join(str(getattr(cause, "orig", None) or cause).split())[:250])
        if "locked" in text:
            raise UserError(f"{where} is locked by another program (try again when it has let go)") from error
        if opened:
            raise UserError(
                f"{where} can't be used any more: {text} (the same command goes on with the study)"
            ) from error
        raise UserError(f"{where} can't be used: {text} {_remedy(plan, cause)}") from error
    except ImportError as error:
        if opened:
            raise
        name = getattr(error.__cause__, "name", None) or error.name or str(error.__cause__ or error)
        extra = " (pip install 'clplat[postgresql]')" if name == "psycopg" else ""
        raise MissingError(f"{where} needs the Python package {name}, which is not installed{extra}") from error
    except OSError as error:
        if opened:
            raise
        raise UserError(f"{where} can't be used: {error.strerror or error} {_VALID}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if opened:  # else: what a file is read as that is no journal, or another version's
            raise
        raise UserError(f"{where} holds no study that can be read: {type(error).__name__} {_VALID}") from error


def _remedy(plan: Plan, cause: BaseException) -> str:
    from sqlalchemy.exc import OperationalError

    if isinstance(cause, OperationalError) and not plan.storage.startswith("sqlite"):
        return "(is the server up, and are host, user, password and database right?)"
    return _VALID


def _storage(where: str) -> Any:
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    if "://" in where:
        return open_database(where)
    Path(where).parent.mkdir(parents=True, exist_ok=True)
    return JournalStorage(JournalFileBackend(where, cast(Any, _Lock(f"{where}.lock"))))


class _Lock:
    """Of a journal, as Optuna asks for one: let go of by the system where its holder dies, which its own are not."""

    def __init__(self, path: str) -> None:
        self.path, self.held = path, threading.local()

    def acquire(self) -> bool:
        """Wait until it is this thread's."""
        self.held.file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115 - closed in release
        fcntl.flock(self.held.file, fcntl.LOCK_EX)
        return True

    def release(self) -> None:
        """Let go of it."""
        self.held.file.close()


def _pruner(plan: Plan) -> Any:
    """By experiences: the first rung is one of them."""
    from optuna import pruners

    if plan.pruner == "hyperband":
        return pruners.HyperbandPruner(min_resource=1, max_resource="auto")
    if plan.pruner == "successive_halving":
        return pruners.SuccessiveHalvingPruner(min_resource=1, reduction_factor=2)
    return pruners.MedianPruner() if plan.pruner == "median" else pruners.NopPruner()


def _sampler(plan: Plan, seed: int | None) -> Any:
    from optuna import samplers

    kind = plan.sampler
    if kind == "auto":
        kind = "gp" if plan.trials <= GP_TRIALS else "tpe"
    if kind in ("random", "grid"):  # the points of a grid are queued
        return samplers.RandomSampler(seed=seed)
    if kind == "gp":
        return samplers.GPSampler(seed=seed, deterministic_objective=False)
    if kind == "nsgaii":
        return samplers.NSGAIISampler(seed=seed, population_size=max(4, min(50, plan.trials // 4)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that two arguments are experimental
        return samplers.TPESampler(seed=seed, multivariate=True, constant_liar=True)
