"""MLflow tracking that training never waits for, and that loses nothing.

The run directory's metrics.jsonl is the truth. One daemon thread reads it from where it stopped, sends what is new
in batches, and keeps in tracking.json the run's id and the bytes sent. A point is never logged twice: on (re-)opening
a run the server says which step each metric has reached, and what does not go beyond that is skipped; so one metric
must keep to one axis. A store that is away or slow costs nothing but a later delivery: on resume, at the end of the
run, or by `send_pending`.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from clplat.config.settings import TrackingSettings
from clplat.errors import UserError
from clplat.tracking.state import held, new_state, parent_of, read_state, write_state
from clplat.tracking.store import DeletedError, RunSender, deleted_in, load

PAUSE_SECONDS = 1.0  # between two deliveries: gathers lines into batches
LONGEST_PAUSE_SECONDS = 30.0  # between two attempts while the store is away
LAST_ATTEMPTS = 3  # at the end of a run
PATIENCE_SECONDS = 10.0  # at the end of a run, for a server that does not answer
NESTED_SECONDS = 2.0  # at the end of a run of a sweep, which goes on with the next one: what is left is sent at its end
SAID_SECONDS = 2.0  # a wait longer than this is said

# A store that is away must fail fast: MLflow's defaults wait for minutes. The user's own settings win.
_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_UV_AUTO_DETECT": "false",  # a logged model would take along the uv.lock of whatever folder one is in
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # what goes wrong is told by us, in one line, at the end
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",  # two lines for each run, in the midst of ours
}
_ALWAYS_NEW = {"params", "tags", "datasets", "run_name", "finish", "done", "described"}


def default_uri(output: str | Path) -> str:
    """$MLFLOW_TRACKING_URI, or the absolute URI of the store `mlflow.db` beside the output folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path(output).absolute().parent / 'mlflow.db'}"


def default_experiment() -> str:
    """$MLFLOW_EXPERIMENT_NAME, or `clplat`."""
    return os.environ.get("MLFLOW_EXPERIMENT_NAME") or "clplat"


def absolute_uri(uri: str) -> str:
    """`uri` with a relative SQLite path made absolute.

    Raises:
        UserError: a kind of store that MLflow no longer has, or none.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme == "sqlite":
        head, _, path = uri.partition(":///")
        return f"{head}:///{Path(path).absolute()}"
    if scheme not in ("http", "https", "postgresql", "mysql", "mssql"):
        raise UserError(
            f"tracking.uri (or $MLFLOW_TRACKING_URI): {uri!r} is no tracking store (valid: sqlite:///FILE.db, "
            "http(s)://HOST:PORT, postgresql://...)"
        )
    return uri


def store_of(settings: TrackingSettings, output: str | Path) -> tuple[str, str]:
    """URI of the store and name of the experiment that a run with these settings goes to.

    Raises:
        UserError: no valid store, or the experiment was deleted in a local one; nothing is asked of a remote one.
    """
    uri, experiment = absolute_uri(settings.uri or default_uri(output)), settings.experiment or default_experiment()
    if settings.enabled and (fault := deleted_in(uri, experiment)):
        raise UserError(f"tracking.experiment: {experiment!r} in {without_password(uri)}: {fault}")
    return uri, experiment


class Tracker:
    """One run in MLflow.

    Args:
        run_dir: the run's folder.
        settings: where to track; not enabled makes every method do nothing.
        run_name: shown in the list of runs.
        params: the configuration, flattened.
        tags: of the run; those in the settings are added.
        datasets: (name, digest) of what the stream consists of.
        age: seconds since the run began.

    Raises:
        UserError: as `store_of` does.
    """

    def __init__(
        self,
        run_dir: Path,
        settings: TrackingSettings,
        *,
        run_name: str,
        params: dict[str, Any],
        tags: dict[str, str],
        datasets: list[tuple[str, str]],
        age: float = 0.0,
    ) -> None:
        self.run_dir = Path(run_dir).absolute()
        self.enabled = settings.enabled
        uri, experiment = store_of(settings, params.get("output") or self.run_dir.parents[1])
        own = {**tags, **settings.tags}
        self.state = new_state(uri, experiment, run_name, params, own, started=time.time() - age, datasets=datasets)
        before = read_state(self.run_dir) if self.enabled else None
        if before and (before["uri"], before["experiment"]) == (self.state["uri"], self.state["experiment"]):
            self.state.update({k: v for k, v in before.items() if k in self.state and k not in _ALWAYS_NEW})
        self._wake, self._ending, self._abandoned = threading.Event(), threading.Event(), threading.Event()
        self._answered = threading.Event()  # the store has, at least once
        self._thread: threading.Thread | None = None
        self._writing = threading.Lock()
        self._problem: str | None = None

    def start(self) -> None:
        """Start sending; waits for MLflow's import alone. A second call does nothing."""
        if not self.enabled or self._thread is not None:
            return
        environment.enter()
        load()  # here, since the thread would take the interpreter from the steps while it does
        self._thread = threading.Thread(target=self._work, name="clplat-tracking", daemon=True)
        self._thread.start()

    def notify(self) -> None:
        """There are new lines in metrics.jsonl."""
        self._wake.set()

    def finish(self, status: str, artifacts: list[Path], timeout_seconds: float = 30.0) -> str | None:
        """Send what is left and end the run.

        Args:
            status: FINISHED, FAILED or KILLED.
            artifacts: files and folders to keep with the run. From a summary.json the final metrics are taken.
            timeout_seconds: wait no longer than this; for a server that does not answer, 10 s; for any server 2 s where
                the run is one of a sweep. Ctrl-C ends the wait. What is under way then goes on beside what comes next.

        Returns:
            One line for the user if something could not be sent; it stays in the run directory.
        """
        if not self.enabled or self._ending.is_set():
            return None
        self.start()
        assert self._thread is not None
        whole = [a.resolve() for a in artifacts]  # a relative path would be looked for under the run's folder
        files = [str(a.relative_to(self.run_dir) if a.is_relative_to(self.run_dir) else a) for a in whole]
        self.state["finish"] = {"status": status, "artifacts": files, "time": time.time()}
        self._save()
        self._ending.set()
        self._wake.set()
        try:
            why = self._wait(timeout_seconds)
        finally:
            self._abandoned.set()
            environment.leave()
        if self.state["done"]:
            return None
        return (
            f"tracking: not everything reached {without_password(self.state['uri'])} ({why}); "
            f"it is kept in {self.run_dir} and sent on resume or by `clplat ui`"
        )

    def _wait(self, seconds: float) -> str:
        """Wait for the sender; why it has not ended, if it has not."""
        assert self._thread is not None
        begun, said, remote = time.monotonic(), False, not self.state["uri"].startswith("sqlite")
        if remote and parent_of(self.run_dir, self.state) is not None:
            seconds = min(seconds, NESTED_SECONDS)
        try:
            while self._thread.is_alive():
                bound = min(seconds, PATIENCE_SECONDS) if remote and not self._answered.is_set() else seconds
                gone = time.monotonic() - begun
                if gone >= bound:
                    return self._problem or f"no answer within {bound:g} s"
                if gone > SAID_SECONDS and not said and bound > SAID_SECONDS:
                    where, said = without_password(self.state["uri"]), True
                    print(
                        f"tracking: sending the rest to {where}, {bound:g} s at most (Ctrl-C: later)", file=sys.stderr
                    )
                self._thread.join(0.2)
        except KeyboardInterrupt:
            return "the wait was ended by Ctrl-C"
        return self._problem or "its sender has ended"

    def _work(self) -> None:
        """The sender thread. No other sends of this run beside it."""
        self._save()
        with contextlib.ExitStack() as alone:
            with contextlib.suppress(FileNotFoundError):  # a removed run directory is the run's trouble to report
                alone.enter_context(held(self.run_dir))
            self._send_until_done()

    def _send_until_done(self) -> None:
        sender, pause, attempts = RunSender(self.run_dir, self.state, self._save, reopen=True), PAUSE_SECONDS, 0
        while not self._abandoned.is_set():
            ending = self._ending.is_set()  # asked before sending: all lines are written once it is set
            try:
                with _quiet():
                    sender.send()
                    self._answered.set()
                    if ending:
                        sender.close()
                self._problem, pause = None, PAUSE_SECONDS
            except Exception as error:  # noqa: BLE001 - whatever the store does, training goes on
                self._problem, pause = one_line(error), min(2 * pause, LONGEST_PAUSE_SECONDS)
                attempts += LAST_ATTEMPTS if isinstance(error, DeletedError) and ending else ending
            if self.state["done"] or attempts >= LAST_ATTEMPTS:
                return
            if ending:
                self._abandoned.wait(0.5)
            else:
                self._ending.wait(pause)
                if self._problem is None:
                    self._wake.wait(sender.next_sample())
                    self._wake.clear()

    def _save(self) -> None:
        with self._writing:
            write_state(self.run_dir, self.state)


def send_pending(run_dir: str | Path) -> bool:
    """Send what a run could not send while it lasted, and its final status if it had one.

    Returns:
        Whether there was anything to send.

    Raises:
        Exception: as MLflow gives it, if the store is still away; nothing is lost.
    """
    run_dir = Path(run_dir).absolute()
    if read_state(run_dir) is None:
        return False
    environment.enter()
    try:
        with _quiet(), held(run_dir):
            state = read_state(run_dir)
            if state is None or state["done"]:
                return False
            sender = RunSender(run_dir, state, lambda: write_state(run_dir, state), reopen=False)
            sender.send(system=False)
            if state["finish"] is not None:
                sender.close()
    finally:
        environment.leave()
    return True


def pending(output: str | Path) -> list[Path]:
    """Run directories below `output` that ended with something unsent."""
    found = []
    for path in sorted(Path(output).glob("**/tracking.json")):
        state = read_state(path.parent)
        if state is not None and state["finish"] is not None and not state["done"]:
            found.append(path.parent)
    return found


class _Environment:
    """Sets variables that MLflow reads while any tracker is at work, and puts back what was there.

    Entered and left by the caller's thread, not the sender's: changing the environment beside running C code that
    reads it is not safe.
    """

    def __init__(self) -> None:
        self._users, self._lock = 0, threading.Lock()
        self._set: list[str] = []

    def enter(self) -> None:
        """Set what the first tracker of this process needs."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._set = [k for k in _ENVIRONMENT if k not in os.environ]
                os.environ.update({k: _ENVIRONMENT[k] for k in self._set})

    def leave(self) -> None:
        """Undo it when the last one is done."""
        with self._lock:
            self._users = max(0, self._users - 1)
            if self._users == 0:
                for name in self._set:
                    os.environ.pop(name, None)
                self._set = []


environment = _Environment()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep this thread's log records about failed connections off the screen: a run with its store away goes on."""
    import logging

    thread = threading.get_ident()

    def elsewhere(record: logging.LogRecord) -> bool:
        return record.thread != thread

    loggers = [logging.getLogger(name) for name in ("urllib3.connectionpool", "alembic.runtime.migration")]
    for logger in loggers:
        logger.addFilter(elsewhere)
    try:
        yield
    finally:
        for logger in loggers:
            logger.removeFilter(elsewhere)


def without_password(text: str) -> str:
    """`text` with the passwords of addresses in it starred out."""
    return re.sub(r"://([^/\s:@]*):[^/\s@]+@", r"://\1:***@", text)


def one_line(error: Exception) -> str:
    """What an error says, in a line without passwords."""
    text = without_password(" ".join(str(error).split())) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
