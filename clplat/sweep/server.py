"""A database that a study is kept in: its URL, shown without the password, and patience while its server is away."""

from __future__ import annotations

import functools
import multiprocessing
import re
import sys
import time
from collections.abc import Callable
from typing import Any

from clplat.errors import UserError

PATIENCE = 60.0  # seconds that a server may be away, as it is while it restarts, before a command ends
CONNECT_SECONDS = 10  # to wait for an answer of a server; libpq would wait for minutes
_PAUSE = 0.5  # seconds between two tries
_POSTGRESQL = ("postgresql", "postgres", "postgresql+psycopg")


def storage_errors() -> tuple[type[Exception], ...]:
    """What a database's refusals are raised as."""
    from optuna.exceptions import StorageInternalError
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError, StorageInternalError


def cause_of(error: BaseException) -> BaseException:
    """What the database said, which Optuna wraps."""
    return error.__cause__ or error if type(error).__name__ == "StorageInternalError" else error


def without_password(text: str) -> str:
    """A URL, or a text with one in it, as it may be shown."""
    text = re.sub(r"(://[^:/?@\s]*):.*@", r"\1:***@", text)
    return re.sub(r"([?&]\w*password=)[^&\s]*", r"\1***", text)


def open_database(url: str) -> Any:
    """An Optuna storage at a URL, whose tables are made if missing; PostgreSQL is spoken to by `psycopg`.

    Raises:
        UserError: it is no URL.
        SQLAlchemyError, StorageInternalError, ImportError: it can't be used.
    """
    from optuna.storages import RDBStorage, get_storage
    from sqlalchemy.exc import ArgumentError, DBAPIError
    from sqlalchemy.pool import NullPool

    given, (head, _, rest) = url, url.partition("://")
    options: dict[str, Any] = {}
    if head in _POSTGRESQL:
        url = f"postgresql+psycopg://{rest}"
        options = {"poolclass": NullPool}  # no connection is held: it may be gone when it is used next
        if "connect_timeout=" not in rest:
            options["connect_args"] = {"connect_timeout": CONNECT_SECONDS}
    for last in (False, True):
        try:
            return _patient(get_storage(RDBStorage(url, engine_kwargs=options)))
        except (ArgumentError, ValueError) as error:
            if "Can't load plugin" in str(error):  # NoSuchModuleError: it names the kind of database
                raise
            valid = "(valid: as sqlite:///study.db or postgresql://user@host/database)"
            raise UserError(f"sweep.storage: {without_password(given)!r} is no database URL {valid}") from None
        except DBAPIError as error:  # another command makes the tables at the same time
            if last or not re.search("already exists|duplicate key", str(error)):
                raise
            time.sleep(_PAUSE)
    raise AssertionError


def _patient(storage: Any) -> Any:
    """The storage, whose methods try again for up to `PATIENCE` while its server is away or a lock is held."""
    from optuna.storages import BaseStorage

    away = _Away()
    for name in dir(BaseStorage):
        if not name.startswith("_"):
            setattr(storage, name, away.bridged(getattr(storage, name)))
    return storage


class _Away:
    """Since when a storage has been away. Once that has been too long, nothing waits for it until it has answered."""

    def __init__(self) -> None:
        self.since: float | None = None

    def bridged(self, act: Callable[..., Any]) -> Callable[..., Any]:
        """`act`, tried again while it may pass."""

        @functools.wraps(act)
        def again(*args: Any, **kwargs: Any) -> Any:
            while True:
                try:
                    found = act(*args, **kwargs)
                except storage_errors() as error:
                    if not _may_pass(error) or self._is_too_long():
                        raise
                    time.sleep(_PAUSE)
                else:
                    self.since = None
                    return found

        return again

    def _is_too_long(self) -> bool:
        if self.since is None:
            self.since = time.monotonic()
            if multiprocessing.parent_process() is None:  # one of several processes says it
                print(f"clplat: the study's storage does not answer; trying for {PATIENCE:.0f} s", file=sys.stderr)
        return time.monotonic() - self.since > PATIENCE


def _may_pass(error: BaseException) -> bool:
    from sqlalchemy.exc import InterfaceError, OperationalError

    cause = cause_of(error)
    return isinstance(cause, OperationalError | InterfaceError) or bool(getattr(cause, "connection_invalidated", False))
