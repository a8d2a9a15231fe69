"""One run in an MLflow store: opening it once, sending lines of metrics.jsonl to it, ending it."""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from clplat.tracking import charts
from clplat.tracking.names import metric_name, shortened
from clplat.tracking.state import held, parent_of, read_state, write_state

BATCH = 1000  # metrics in a request
BLOCK = 1 << 18  # bytes of metrics.jsonl read at once
SAMPLE_SECONDS = 10.0  # between two samples of the system
HELD_SAMPLES = 2000  # system metrics kept while the store is away; older ones go first
KEY_TAG = "clplat.run"
SWEEP_TAG = "clplat.sweep"  # in its place on a study or a trial, under which runs are nested


class DeletedError(Exception):
    """The experiment was deleted in the store: no later attempt will do."""


class RunSender:
    """Sends one run directory's measurements; every method may be repeated after a failure.

    Args:
        run_dir: the run's folder.
        state: contents of tracking.json; kept up to date.
        save: writes the state.
        reopen: set the run's status to RUNNING.
    """

    def __init__(self, run_dir: Path, state: dict[str, Any], save: Callable[[], None], *, reopen: bool) -> None:
        self.run_dir, self.state, self._save, self._reopen = run_dir, state, save, reopen
        self._key_tag = SWEEP_TAG if state.get("nests") else KEY_TAG
        self._client: Any = None
        self._reached: dict[str, int] = {}  # metric → largest step the store has
        self._monitors: list[Any] | None = None
        self._held: list[tuple[str, float, float]] = []  # system metrics: name, value, time
        self._sampled = 0.0

    def send(self, *, system: bool = True) -> None:
        """Send everything new. Raises whatever MLflow raises."""
        if system:
            self._sample()
        if self._client is None:
            self._connect()
        try:
            if not self.state["described"]:
                self._describe()
            self._send_lines()
            self._send_system()
        except Exception as error:
            if "RESOURCE_DOES_NOT_EXIST" in str(getattr(error, "error_code", "")):
                self._client = None  # deleted under us: open another
            raise

    def close(self) -> None:
        """Final metrics, artifacts, and the status asked for."""
        finish = self.state["finish"]
        self._send_final(finish["time"])
        self._drop_model()
        for name in finish["artifacts"]:
            path = self.run_dir / name
            if (path / "MLmodel").is_file():
                self._log_model(path)
            elif path.is_dir():
                self._client.log_artifacts(self.state["run_id"], str(path), path.name)
            elif path.is_file():
                self._client.log_artifact(self.state["run_id"], str(path))
        self._client.set_terminated(self.state["run_id"], finish["status"], int(finish["time"] * 1000))
        self.state["done"] = True
        self._save()

    def _log_model(self, folder: Path) -> None:
        """A folder that MLflow takes for a model, as one of this run's."""
        client, run_id = self._client, self.state["run_id"]
        experiment = client.get_run(run_id).info.experiment_id
        model = client.create_logged_model(experiment, name="learner", source_run_id=run_id, model_type="clplat")
        self.state["model_id"] = model.model_id
        self._save()
        client.log_model_artifacts(model.model_id, str(folder))
        client.finalize_logged_model(model.model_id, "READY")

    def _drop_model(self) -> None:
        """Delete the model of an earlier end; on this machine its files, too, which MLflow would keep: a request to
        forget may lie between."""
        from mlflow.exceptions import MlflowException

        if (former := self.state.get("model_id")) is None:
            return
        with contextlib.suppress(MlflowException):  # deleted by hand
            place = urlsplit(self._client.get_logged_model(former).artifact_location)
            self._client.delete_logged_model(former)
            if place.scheme == "file":
                shutil.rmtree(unquote(place.path), ignore_errors=True)
        self.state["model_id"] = None
        self._save()

    def next_sample(self) -> float:
        """Seconds until the next sample of the system is due."""
        return max(0.0, self._sampled + SAMPLE_SECONDS - time.monotonic())

    def _connect(self) -> None:
        from mlflow import MlflowClient

        with _alone(self.state["uri"]):
            client = MlflowClient(tracking_uri=self.state["uri"])
            experiment = client.get_experiment_by_name(self.state["experiment"])
            if experiment is None:
                experiment = _create_experiment(client, self.state["uri"], self.state["experiment"], self.run_dir)
        if experiment.lifecycle_stage == "deleted":
            raise DeletedError(f"experiment {self.state['experiment']!r}: {_restore(experiment.experiment_id)}")
        run = self._find_run(client, experiment.experiment_id)
        if run is None:
            tags = {**self.state["tags"], self._key_tag: self.state["key"], "mlflow.source.name": "clplat"}
            if (parent := self._parent()) is not None:
                tags["mlflow.parentRunId"] = parent
            if commit := tags.get("git_commit"):
                tags["mlflow.source.git.commit"] = commit
            begun, name = int(self.state["started"] * 1000), self.state["run_name"]
            run = client.create_run(experiment.experiment_id, start_time=begun, run_name=name, tags=tags)
            self.state.update(offset=0, tail="", described=False)
        elif self._reopen:
            client.update_run(run.info.run_id, status="RUNNING")
        self.state["run_id"] = run.info.run_id
        self._reached = {m.key: m.step for m in run.data._metric_objs}
        self._check_offset()
        self._save()
        _set_layout(client, experiment)
        self._client = client

    def _parent(self) -> str | None:
        """Id of the run that this one is nested under, which the first to ask opens."""
        if (folder := parent_of(self.run_dir, self.state)) is None:
            return None
        with held(folder):
            state = read_state(folder)
            assert state is not None
            if state["run_id"] is None:
                RunSender(folder, state, lambda: write_state(folder, state), reopen=False)._connect()
            return state["run_id"]

    def _find_run(self, client: Any, experiment_id: str) -> Any:
        """The run of this directory: by its id, or by the key put on it when only its id got lost."""
        from mlflow.exceptions import MlflowException

        if self.state["run_id"] is not None:
            try:
                run = client.get_run(self.state["run_id"])
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                return None
            return run if run.info.lifecycle_stage == "active" else None
        runs = client.search_runs([experiment_id], f"tags.`{self._key_tag}` = '{self.state['key']}'", max_results=1)
        return runs[0] if runs else None

    def _check_offset(self) -> None:
        """Start from the top if the file no longer is what was sent: a resume cuts it back to its checkpoint."""
        tail, offset = self.state["tail"].encode(), self.state["offset"]
        with contextlib.suppress(FileNotFoundError), open(self.run_dir / "metrics.jsonl", "rb") as file:
            file.seek(max(0, offset - len(tail)))
            if file.read(len(tail)) == tail:
                return
        self.state.update(offset=0, tail="")

    def _describe(self) -> None:
        """Parameters, tags and data sets; a parameter already there keeps its value, as MLflow wants it."""
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag, Param, RunTag
        from mlflow.utils.validation import MAX_PARAM_VAL_LENGTH

        run_id, run = self.state["run_id"], self._client.get_run(self.state["run_id"])
        wanted = {metric_name(k): shortened(v, MAX_PARAM_VAL_LENGTH) for k, v in self.state["params"].items()}
        params = [Param(k, v) for k, v in wanted.items() if k not in run.data.params]
        tags = {**self.state["tags"]}
        tags |= {f"resumed.{k}": v for k, v in wanted.items() if run.data.params.get(k, v) != v}
        self._client.log_batch(run_id, tags=[RunTag(k, v[:5000]) for k, v in tags.items()])
        for start in range(0, len(params), 100):
            self._client.log_batch(run_id, params=params[start : start + 100])
        known = {d.dataset.name for d in run.inputs.dataset_inputs}
        source = CodeDatasetSource(tags={})
        new = [(n, d) for n, d in self.state["datasets"] if n not in known]
        data = [MetaDataset(source, name=n, digest=d) for n, d in new]  # type: ignore[abstract]
        if data:
            context = [InputTag("mlflow.data.context", "stream")]
            self._client.log_inputs(run_id, [DatasetInput(d._to_mlflow_entity(), context) for d in data])
        self.state["described"] = True
        self._save()

    def _send_lines(self) -> None:
        """Whole lines from the offset on; one that is still being written waits."""
        while block := self._read_block():
            batch: list[Any] = []
            end = self.state["offset"]
            tail = b""
            for line in block.splitlines(keepends=True):
                points = self._points(line)
                if batch and len(batch) + len(points) > BATCH:
                    self._send_batch(batch, end, tail)
                    batch = []
                batch += points
                end += len(line)
                tail = line
            self._send_batch(batch, end, tail)

    def _read_block(self) -> bytes:
        try:
            with open(self.run_dir / "metrics.jsonl", "rb") as file:
                file.seek(self.state["offset"])
                block = file.read(BLOCK)
                if b"\n" not in block:
                    block += file.readline()
        except FileNotFoundError:
            return b""
        return block[: block.rfind(b"\n") + 1]

    def _points(self, line: bytes) -> list[Any]:
        from mlflow.entities import Metric

        try:
            row = json.loads(line)
            step, millis = int(row["step"]), int(row["time"] * 1000)
            values = {metric_name(k): float(v) for k, v in row["metrics"].items() if v is not None}
        except (ValueError, KeyError, TypeError, AttributeError):
            return []  # torn by a power cut
        return [Metric(k, v, millis, step) for k, v in values.items() if step > self._reached.get(k, -1)]

    def _send_batch(self, batch: list[Any], end: int, tail: bytes) -> None:
        if batch:
            self._client.log_batch(self.state["run_id"], metrics=batch)
            for metric in batch:
                self._reached[metric.key] = max(metric.step, self._reached.get(metric.key, -1))
        self.state.update(offset=end, tail=tail.decode(errors="replace")[-200:] if tail.isascii() else "")
        self._save()

    def _send_final(self, when: float) -> None:
        """Metrics of the summary that the last experience did not log, or logged otherwise."""
        from mlflow.entities import Metric

        try:
            summary = json.loads((self.run_dir / "summary.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            summary = {"metrics": self.state["finish"].get("metrics", {})}
        run = self._client.get_run(self.state["run_id"])
        values = {**summary.get("metrics", {}), **{f"cost/{k}": v for k, v in summary.get("cost", {}).items()}}
        step, millis = len(summary.get("experiences", [])), int(when * 1000)
        new = [Metric(metric_name(k), float(v), millis, max(step, self._reached.get(metric_name(k), 0)))
               for k, v in values.items()
               if isinstance(v, int | float) and run.data.metrics.get(metric_name(k)) != float(v)]  # fmt: skip
        if new:
            self._client.log_batch(self.state["run_id"], metrics=new)

    def _sample(self) -> None:
        """CPU, memory, disk, network and GPU under MLflow's names; on this thread, as its own monitor has another."""
        if self._sampled and self.next_sample() > 0:
            return
        self._sampled = time.monotonic()
        if self._monitors is None:
            self._monitors = _monitors()
        for monitor in self._monitors:
            with contextlib.suppress(Exception):  # a device that stops answering must not hold back the rest
                monitor.collect_metrics()
                self._held += [(f"system/{k}", float(v), time.time()) for k, v in monitor.aggregate_metrics().items()]
                monitor.clear_metrics()
        del self._held[:-HELD_SAMPLES]

    def _send_system(self) -> None:
        from mlflow.entities import Metric

        while self._held:
            part, reached = self._held[:BATCH], dict(self._reached)
            batch = []
            for name, value, when in part:
                reached[name] = reached.get(name, -1) + 1
                batch.append(Metric(name, value, int(when * 1000), reached[name]))
            self._client.log_batch(self.state["run_id"], metrics=batch)
            self._reached = reached
            del self._held[: len(part)]


def _create_experiment(client: Any, uri: str, name: str, run_dir: Path) -> Any:
    """A new experiment; in a local store its artifacts lie beside the database, elsewhere the server decides."""
    from mlflow.exceptions import MlflowException

    location = None
    if uri.startswith("sqlite"):
        location = (Path(uri.partition(":///")[2]).parent / "mlartifacts").as_uri()
    elif not uri.startswith("http"):
        location = (run_dir.parents[2] / "mlartifacts").as_uri()
    try:
        return client.get_experiment(client.create_experiment(name, artifact_location=location))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
        return client.get_experiment_by_name(name)


def _set_layout(client: Any, experiment: Any) -> None:
    import mlflow

    if charts.supported(mlflow.__version__) and experiment.tags.get(charts.VERSION_TAG) != charts.LAYOUT_VERSION:
        client.set_experiment_tag(experiment.experiment_id, charts.TAG, charts.view())
        client.set_experiment_tag(experiment.experiment_id, charts.VERSION_TAG, charts.LAYOUT_VERSION)


@functools.cache
def load() -> None:
    """Import what sending takes of MLflow: seconds of work, once in a process."""
    with warnings.catch_warnings():  # tqdm's, in a notebook, that bars which nobody asked for lack ipywidgets
        warnings.filterwarnings("ignore", "IProgress not found")
        from mlflow.store.tracking import sqlalchemy_store  # noqa: F401
        from mlflow.system_metrics.metrics import cpu_monitor, disk_monitor, gpu_monitor, network_monitor  # noqa: F401

    gc.collect()  # half a second after so many objects: now, not in some later step


def _monitors() -> list[Any]:
    """MLflow's collectors of those things that this machine has."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found = []
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        with contextlib.suppress(Exception):  # no GPU, no network interface
            monitor = kind()
            monitor.collect_metrics()
            monitor.aggregate_metrics()
            monitor.clear_metrics()
            found.append(monitor)
    return found


@contextlib.contextmanager
def _alone(uri: str) -> Iterator[None]:
    """While several runs start on one new SQLite file, let one of them make its tables."""
    if not uri.startswith("sqlite"):
        yield
        return
    import fcntl

    path = Path(uri.partition(":///")[2])
    path.parent.mkdir(parents=True, exist_ok=True)
    held = path.with_name(f".{path.name}.lock")
    while True:
        with open(held, "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(lock.fileno()), held.stat()):
                    try:
                        yield
                    finally:
                        held.unlink(missing_ok=True)  # while it is held: who waits for this file tries anew
                    return


def deleted_in(uri: str, experiment: str) -> str | None:
    """What to do about an experiment of this name that was deleted in a local store; None where there is none.

    Asks SQLite itself: MLflow takes seconds to import.
    """
    import sqlite3

    if not uri.startswith("sqlite") or not (file := Path(uri.partition(":///")[2])).is_file():
        return None
    try:
        with contextlib.closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, timeout=1)) as store:
            query = "select experiment_id from experiments where name = ? and lifecycle_stage = 'deleted'"
            row = store.execute(query, (experiment,)).fetchone()
    except sqlite3.Error:  # no store of MLflow's yet, or a busy one: found out when the run connects
        return None
    return None if row is None else _restore(row[0])


def _restore(experiment_id: Any) -> str:
    return (
        f"it was deleted there (restore it: mlflow experiments restore --experiment-id {experiment_id}; or set another "
        "tracking.experiment)"
    )
