"""`clplat ui`: the MLflow server on the local store, for this machine only unless asked otherwise."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clplat.errors import UserError
from clplat.tracking import charts

START_SECONDS = 180.0  # a busy machine needs 20
STOP_SECONDS = 10.0


def serve(
    output: str | Path = "runs",
    *,
    uri: str | None = None,
    host: str = "127.0.0.1",
    port: int = 5000,
    experiment: str | None = None,
) -> int:
    """Start the server, print the link to the charts, send what runs could not send, and wait for Ctrl-C.

    Args:
        output: folder of the runs; their store lies beside it.
        uri: another store. Of a server that already runs (http...) only the link is printed.
        host: address to listen on; other than this machine's own, a warning says who can read and change the store.
        port: 0 takes a free one.
        experiment: MLflow experiment that the link opens; None is $MLFLOW_EXPERIMENT_NAME, or `clplat`.

    Returns:
        0 after Ctrl-C or SIGTERM.

    Raises:
        UserError: the port is taken, or the server did not start; the message holds its last lines.
    """
    from clplat.tracking.client import absolute_uri, default_experiment, default_uri

    asked, experiment = experiment is not None, experiment or default_experiment()
    store = absolute_uri(uri) if uri else default_uri(output)
    if store.startswith("http"):
        print(_link(store.rstrip("/"), experiment, asked), flush=True)
        _send_held_back(output)
        return 0
    port = _free_port(host, port)
    if not _is_loopback(host):
        print(
            f"clplat: listening on {host}: whoever reaches this machine can read and change the store", file=sys.stderr
        )
    with stops_on_sigterm(), _running(store, host, port) as process:
        print(_link(_base(host, port), experiment, asked), flush=True)
        print("Ctrl-C stops the server.", flush=True)
        try:
            _send_held_back(output)
            process.wait()
        except KeyboardInterrupt:
            return 0
    raise UserError(f"ui: the server stopped by itself (exit code {process.returncode})")


def command(store: str, host: str, port: int) -> list[str]:
    """The server's command line: one worker, artifacts beside a SQLite store."""
    line = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", store, "--host", host, "--port", str(port),
            "--workers", "1"]  # fmt: skip
    if store.startswith("sqlite"):
        line += ["--artifacts-destination", str(Path(store.partition(":///")[2]).parent / "mlartifacts")]
    return line


@contextlib.contextmanager
def _running(store: str, host: str, port: int) -> Iterator[subprocess.Popen[bytes]]:
    """The server, from when it answers; stopped with all its processes at the end."""
    # The job runner costs 235 MB and serves nothing that is used here.
    environment = {"MLFLOW_DISABLE_TELEMETRY": "true", **os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            command(store, host, port), env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            end = time.monotonic() + START_SECONDS
            while not _answers(_base(host, port)):
                if process.poll() is not None or time.monotonic() > end:
                    log.seek(0)
                    lines = log.read().decode(errors="replace").strip().splitlines()[-3:]
                    raise UserError(f"ui: the MLflow server did not start: {' | '.join(lines)}")
                time.sleep(0.2)
            yield process
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)


@contextlib.contextmanager
def stops_on_sigterm() -> Iterator[None]:
    """SIGTERM ends this process as Ctrl-C does, so that the server does not outlive it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _send_held_back(output: str | Path) -> None:
    from clplat.tracking.client import pending, send_pending

    for run_dir in pending(output):
        try:
            send_pending(run_dir)
            print(f"sent what {run_dir} had held back", flush=True)
        except Exception as error:  # noqa: BLE001 - it stays where it is; the server is of use all the same
            print(f"clplat: {run_dir}: still not sent ({str(error).splitlines()[0][:160]})", file=sys.stderr)


def _link(base: str, experiment: str, asked: bool) -> str:
    """Address of the experiment's charts, or of the list of experiments where it is not there.

    Args:
        asked: whether the user named it: then its absence is said.
    """
    query = urllib.parse.urlencode({"experiment_name": experiment})
    try:
        return charts.link(base, _get(f"{base}/api/2.0/mlflow/experiments/get-by-name?{query}")["experiment_id"])
    except urllib.error.HTTPError:
        if asked:
            print(f"clplat: ui: no experiment {experiment!r} in this store{_known(base)}", file=sys.stderr)
    except (OSError, ValueError, KeyError):
        print(f"clplat: ui: {base} does not answer as an MLflow server does", file=sys.stderr)
    return f"{base}/#/experiments?workflowType=machine_learning"


def _known(base: str) -> str:
    """The experiments that are there."""
    with contextlib.suppress(OSError, ValueError, KeyError):
        found = _get(f"{base}/api/2.0/mlflow/experiments/search?max_results=20", "experiments")
        return f" (there are: {', '.join(e['name'] for e in found)})"
    return ""


def _get(address: str, key: str = "experiment") -> Any:
    with urllib.request.urlopen(address, timeout=10) as answer:
        return json.load(answer)[key]


def _answers(base: str) -> bool:
    try:
        with urllib.request.urlopen(f"{base}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def _base(host: str, port: int) -> str:
    """Address to open in a browser here."""
    name = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    return f"http://{name}:{port}"


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _free_port(host: str, port: int) -> int:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"ui: can't listen on {host}:{port}: {error.strerror} (another: --port N)") from error
        return probe.getsockname()[1]
