"""What an MLflow store holds of runs, read and never written: facts, files, and curves thinned where they lie.

Databases are asked in SQL: MLflow's client makes an object of each point, which takes minutes for a few million. A
server is asked through its client, and for curves as its own page does.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from clplat.config.discovery import did_you_mean
from clplat.errors import MissingError, UserError
from clplat.metrics.catalogue import METRICS
from clplat.tracking.client import without_password
from clplat.tracking.names import CUT, GROUP_TAG, metric_name
from clplat.tracking.store import KEY_TAG, SWEEP_TAG

POINTS = 200  # of a curve: more cannot be told apart on a screen
_STATUS = {"FINISHED": "complete", "KILLED": "interrupted", "FAILED": "failed"}
_PLAIN_TAGS = ("strategy", "stream", "backbone", "seed", "git_commit", "clplat", "late_requests", KEY_TAG, GROUP_TAG)
_TOGETHER, _AT_ONCE = 100, 16  # runs in a request for curves; requests at a time

Curves = dict[tuple[str, str], list[tuple[float, float]]]  # (run's id, metric) → (step, value) in order


class Store(Protocol):
    """A store that can be read."""

    def runs(self) -> list[dict[str, Any]]:
        """run_id, name, experiment, status, started and ended (ms), artifacts, tags, params, metrics of each run."""

    def texts(self, runs: Sequence[Mapping[str, Any]], name: str) -> list[str | None]:
        """A file of each run, or None where it has none or that is out of reach."""

    def curves(self, run_ids: Sequence[str], names: Sequence[str]) -> Curves:
        """Metrics over steps, at most about `POINTS` points each."""

    def page_of(self, run: Mapping[str, Any]) -> Path | str | None:
        """The run's report: a file here, or the address of its artifacts."""


def open_store(uri: str) -> Store:
    """The store at an absolute URI.

    Raises:
        MissingError: a SQLite file that is not there.
        UserError: it cannot be read as MLflow's.
    """
    if uri.startswith("http"):
        return _Server(uri)
    if uri.startswith("sqlite") and not Path(uri.partition(":///")[2]).is_file():
        where = uri.partition(":///")[2]
        raise MissingError(f"dashboard: there is no store {where} (valid: --uri, or folders of runs)")
    return _Database(uri)


def held_runs(
    store: Store, experiment: str | None = None
) -> tuple[list[dict[str, Any]], list[str], list[dict[str, Any]]]:
    """Summaries of clplat's runs, as `report.compare` takes them, what is to be said of others, and each sweep.json.

    Beside what summary.json has, each has config, tags (the user's), run_id, run_name, experiment, started (s),
    seconds, report. Of a run that has not ended there are those figures that it has logged last.

    Args:
        experiment: MLflow experiment; None takes all.

    Raises:
        UserError: no experiment of this name.
    """
    found = store.runs()
    if experiment is not None:
        names = list(dict.fromkeys(run["experiment"] for run in found))
        if experiment not in names:
            there = did_you_mean(experiment, names) or f" (there are: {', '.join(names) or 'none with runs'})"
            raise UserError(f"dashboard: --experiment {experiment}: no runs in an experiment of this name{there}")
        found = [run for run in found if run["experiment"] == experiment]
    gathering = [run for run in found if SWEEP_TAG in run["tags"]]  # studies and trials, with their runs under them
    studies = store.texts([run for run in gathering if run["tags"].get("clplat.kind") == "study"], "sweep.json")
    own = [run for run in found if KEY_TAG in run["tags"]]
    others = len(found) - len(gathering) - len(own)
    notes = [f"{others} runs of the store were not made by clplat."] if others else []
    ended = [run for run in own if run["status"] in _STATUS]
    texts = dict(zip((run["run_id"] for run in ended), store.texts(ended, "summary.json"), strict=True))
    summaries = [_summary(store, run, texts.get(run["run_id"])) for run in own]
    if missing := sum(run["without_file"] for run in summaries):
        notes.append(f"{missing} runs that have ended are shown by their metrics alone: summary.json is not with them.")
    return summaries, notes, [study for text in studies if (study := _read_json(text)) is not None]


def _summary(store: Store, run: Mapping[str, Any], text: str | None) -> dict[str, Any]:
    tags, metrics = run["tags"], run["metrics"]
    seed = tags.get("seed", "")
    named = ("strategy", "stream", "backbone", "git_commit", "clplat")
    facts: dict[str, Any] = {part: tags.get(part) for part in named}
    facts |= {"seed": int(seed) if seed.lstrip("-").isdigit() else None, "experiences": [], "metrics": {}, "cost": {}}
    for name, info in METRICS.items():
        key = name if info.group == "metrics" else f"cost/{name}"
        if info.group in ("metrics", "cost") and key in metrics:
            facts[info.group][name] = metrics[key]
    read = _read_json(text)
    facts |= read or {}
    ended = run["status"] in _STATUS
    seconds = None if run["ended"] is None or run["started"] is None else (run["ended"] - run["started"]) / 1000
    return {
        **facts, "status": _STATUS.get(run["status"], "running"), "config": _config(store, run), "run_dir": None,
        "tags": {k: v for k, v in tags.items() if k not in _PLAIN_TAGS and not k.startswith(("mlflow.", "resumed."))},
        "run_id": run["run_id"], "run_name": run["name"], "experiment": run["experiment"],
        "started": (run["started"] or 0) / 1000, "seconds": seconds if ended else None, "report": store.page_of(run),
        "without_file": ended and read is None,
    }  # fmt: skip


def _read_json(text: str | None) -> dict[str, Any] | None:
    """An object; None where there is none."""
    with contextlib.suppress(ValueError):
        found = None if text is None else json.loads(text)
        return found if isinstance(found, dict) else None
    return None


def _config(store: Store, run: Mapping[str, Any]) -> dict[str, Any]:
    """The run's configuration from its parameters, a resume's changes laid over them; where one was cut, from the
    file."""
    resumed = {k.removeprefix("resumed."): v for k, v in run["tags"].items() if k.startswith("resumed.")}
    params = {**run["params"], **resumed}
    if any(value.endswith(CUT) for value in params.values()) and (text := store.texts([run], "config.yaml")[0]):
        import yaml

        with contextlib.suppress(yaml.YAMLError):
            if isinstance(read := yaml.safe_load(text), dict):
                return read
    config: dict[str, Any] = {}
    for key, value in params.items():
        *parts, last = key.split(".")
        node = config
        for part in parts:
            node = node.setdefault(part, {})
            if not isinstance(node, dict):
                break
        else:
            node[last] = _plain(value)
    return config


def _plain(value: str) -> Any:
    """A parameter's value, which was written as JSON where it was no text."""
    try:
        return json.loads(value)
    except ValueError:
        return value


class _Database:
    """SQLite, PostgreSQL and others, by the tables that MLflow keeps there."""

    def __init__(self, uri: str) -> None:
        import sqlalchemy

        self.uri = uri
        self.folder = Path(uri.partition(":///")[2]).parent if uri.startswith("sqlite") else None
        url = f"sqlite:///file:{uri.partition(':///')[2]}?mode=ro&uri=true" if self.folder is not None else uri
        try:
            self.engine = sqlalchemy.create_engine(url, poolclass=sqlalchemy.NullPool)
        except (sqlalchemy.exc.SQLAlchemyError, ImportError) as error:
            raise UserError(f"dashboard: {without_password(uri)}: {str(error).splitlines()[0]}") from error

    def _rows(self, table: str, columns: str, *where: Any) -> Sequence[Any]:
        import sqlalchemy as sql

        named = sql.table(table, *map(sql.column, columns.split()))
        return self._all(sql.select(*named.c).where(*where))

    def _all(self, query: Any) -> Sequence[Any]:
        import sqlalchemy

        try:
            with self.engine.connect() as connection:
                return connection.execute(query).all()
        except sqlalchemy.exc.SQLAlchemyError as error:
            why = str(getattr(error, "orig", None) or error).splitlines()[0]
            where = without_password(self.uri)
            raise UserError(f"dashboard: {where}: no store of MLflow's that can be read ({why})") from error

    def runs(self) -> list[dict[str, Any]]:
        """Active runs of active experiments, oldest first."""
        import sqlalchemy as sql

        active = sql.column("lifecycle_stage") == "active"
        experiments = dict(self._rows("experiments", "experiment_id name", active))
        columns = "run_uuid name experiment_id status start_time end_time artifact_uri"
        found = {
            row[0]: {"run_id": row[0], "name": row[1], "experiment": experiments[row[2]], "status": row[3],
                     "started": row[4], "ended": row[5], "artifacts": row[6], "tags": {}, "params": {}, "metrics": {}}
            for row in self._rows("runs", columns, active) if row[2] in experiments
        }  # fmt: skip
        for part, table in (("tags", "tags"), ("params", "params"), ("metrics", "latest_metrics")):
            for run_id, key, value in self._rows(table, "run_uuid key value", *_finite(table)):
                if run_id in found:
                    found[run_id][part][key] = value
        return sorted(found.values(), key=lambda run: run["started"] or 0)

    def texts(self, runs: Sequence[Mapping[str, Any]], name: str) -> list[str | None]:
        """From artifacts on this machine."""
        return [_read(self._file(run, name)) for run in runs]

    def page_of(self, run: Mapping[str, Any]) -> Path | None:
        """Its file among the artifacts."""
        file = self._file(run, "report.html")
        return file if file is not None and file.is_file() else None

    def _file(self, run: Mapping[str, Any], name: str) -> Path | None:
        """Where a file of a run lies on this machine, if it does."""
        parts = urlsplit(str(run["artifacts"]))
        if parts.scheme in ("", "file"):
            return Path(unquote(parts.path)) / name
        if parts.scheme == "mlflow-artifacts" and self.folder is not None:  # kept by `clplat ui`, beside its database
            return self.folder / "mlartifacts" / unquote(parts.path).lstrip("/") / name
        return None

    def curves(self, run_ids: Sequence[str], names: Sequence[str]) -> Curves:
        """Each point is the mean of a stretch of steps: the power of two that leaves 100 to 200 of the run's."""
        import sqlalchemy as sql

        wanted, kept, found = {metric_name(name): name for name in names}, set(run_ids), Curves()
        stretches: dict[tuple[str, int], list[str]] = {}
        for run_id, key, last in self._rows("latest_metrics", "run_uuid key step", sql.column("key").in_(list(wanted))):
            if run_id in kept:
                stretches.setdefault((key, 1 << (last // POINTS).bit_length()), []).append(run_id)
        metrics = sql.table("metrics", *map(sql.column, ("run_uuid", "key", "step", "value", "is_nan")))
        m = metrics.c
        for (key, stretch), runs in stretches.items():
            query = (
                sql.select(m.run_uuid, sql.func.avg(m.step), sql.func.avg(m.value))
                .where(m.key == key, m.run_uuid.in_(runs), *_finite("metrics"))
                .group_by(m.run_uuid, m.step - m.step % stretch)
            )
            for run_id, step, value in self._all(query):
                found.setdefault((run_id, wanted[key]), []).append((float(step), float(value)))
        for points in found.values():
            points.sort()
        return found


def _finite(table: str) -> list[Any]:
    """That a metric is a number, for tables that say so."""
    import sqlalchemy as sql

    return [sql.not_(sql.column("is_nan", sql.Boolean))] if table.endswith("metrics") else []


def _read(file: Path | None) -> str | None:
    try:
        return None if file is None else file.read_text(encoding="utf-8")
    except (OSError, ValueError):
        return None


class _Server:
    """A tracking server, by MLflow's client."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient

        self.uri = uri.rstrip("/")
        self.client = MlflowClient(tracking_uri=self.uri)

    def runs(self) -> list[dict[str, Any]]:
        """Active runs of active experiments, oldest first."""
        from mlflow.exceptions import MlflowException

        try:
            experiments = {e.experiment_id: e.name for e in self.client.search_experiments()}
            found: list[Any] = []
            token: str | None = ""
            while token is not None:
                page = self.client.search_runs(list(experiments), max_results=1000, page_token=token or None)
                found += page
                token = page.token or None
        except MlflowException as error:
            why = " ".join(str(error).split())[:160]
            where = without_password(self.uri)
            raise UserError(f"dashboard: {where} does not answer as an MLflow server does ({why})") from error
        rows = [
            {"run_id": r.info.run_id, "name": r.info.run_name, "experiment": experiments[r.info.experiment_id],
             "status": r.info.status, "started": r.info.start_time, "ended": r.info.end_time,
             "artifacts": r.info.artifact_uri, "tags": r.data.tags, "params": r.data.params,
             "metrics": {k: v for k, v in r.data.metrics.items() if v == v}, "experiment_id": r.info.experiment_id}
            for r in found
        ]  # fmt: skip
        return sorted(rows, key=lambda run: run["started"] or 0)

    def texts(self, runs: Sequence[Mapping[str, Any]], name: str) -> list[str | None]:
        """Downloaded, several at a time."""
        from mlflow.exceptions import MlflowException

        def text(run: Mapping[str, Any]) -> str | None:
            with contextlib.suppress(MlflowException, ValueError):
                answer = self._get("/get-artifact", {"run_uuid": run["run_id"], "path": name})
                return answer.content.decode() if answer.status_code == 200 else None
            return None

        return _at_once(text, runs)

    def page_of(self, run: Mapping[str, Any]) -> str:
        """Its address in the server's own page."""
        return f"{self.uri}/#/experiments/{run['experiment_id']}/runs/{run['run_id']}/artifacts/report.html"

    def curves(self, run_ids: Sequence[str], names: Sequence[str]) -> Curves:
        """Evenly chosen points of each, as the server gives them to its own page."""
        from mlflow.utils.rest_utils import verify_rest_response

        endpoint = "/ajax-api/2.0/mlflow/metrics/get-history-bulk-interval"

        def ask(asked: tuple[str, Sequence[str]]) -> tuple[str, list[dict[str, Any]]]:
            params = {"run_ids": asked[1], "metric_key": metric_name(asked[0]), "max_results": POINTS}
            answer = verify_rest_response(self._get(endpoint, params), endpoint)
            return asked[0], answer.json().get("metrics", [])

        parts = [run_ids[i : i + _TOGETHER] for i in range(0, len(run_ids), _TOGETHER)]
        found = Curves()
        for name, points in _at_once(ask, [(name, part) for name in names for part in parts]):
            for point in points:
                value = float(point["value"])
                if value - value == 0:
                    found.setdefault((point["run_id"], name), []).append((float(point.get("step", 0)), value))
        for line in found.values():
            line.sort()
        return found

    def _get(self, endpoint: str, params: Mapping[str, Any]) -> Any:
        """As the server's own page asks, with the user's credentials."""
        from mlflow.utils.credentials import get_default_host_creds
        from mlflow.utils.rest_utils import http_request

        return http_request(get_default_host_creds(self.uri), endpoint, "GET", max_retries=1, params=params)


def _at_once(function: Any, items: Iterable[Any]) -> list[Any]:
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return list(pool.map(function, items))
