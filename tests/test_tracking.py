"""Tracking against real stores: a SQLite file and a server process, which are killed and started again."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import urllib.request
from pathlib import Path

import pytest
import sweeping

from clplat.config.settings import TrackingSettings
from clplat.errors import MissingError, UserError
from clplat.run import launch
from clplat.sweep.study import sweep
from clplat.tracking import charts, nested, store
from clplat.tracking.client import Tracker, absolute_uri, default_uri, pending, send_pending, store_of
from clplat.tracking.held import POINTS, held_runs, open_store
from clplat.tracking.names import group_of, metric_name, note_of_sets, shortened
from clplat.tracking.state import held as locked
from clplat.tracking.state import read_state

# MLflow and SQLAlchemy warn of their own deprecations at import and leave a database connection to the collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A database with tables, made once: making them takes seconds."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("prepared") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def run_dir(tmp_path, prepared) -> Path:
    """<tmp>/runs/demo/0 with a store beside `runs`."""
    shutil.copy(prepared, tmp_path / "mlflow.db")
    path = tmp_path / "runs" / "demo" / "0"
    path.mkdir(parents=True)
    return path


def tracker(run_dir: Path, uri: str | None = None, **changes) -> Tracker:
    settings = TrackingSettings(uri=uri, experiment=changes.pop("experiment", "demo"), tags={"mine": "yes"})
    given = {"params": {"strategy.name": "er", "strategy.memory": 50}, "tags": {"strategy": "er", "seed": "0"}}
    return Tracker(run_dir, settings, run_name="demo-0", datasets=[("digits/0", "abc")], **{**given, **changes})


def write(run_dir: Path, steps, name: str = "train/loss", axis: str = "step", mode: str = "a") -> None:
    with open(run_dir / "metrics.jsonl", mode) as file:
        for step in steps:
            row = {"axis": axis, "step": step, "time": time.time(), "metrics": {name: float(step), "gone": None}}
            file.write(json.dumps(row) + "\n")


@pytest.mark.parametrize(
    "names", [["C++", "C##", "C__"], ["情感", "新闻"], ["a/b", "a//b", "a/./b"], ["x" * 300, "x" * 299], ["", "_", "."]]
)
def test_no_two_metrics_share_a_name_in_mlflow(names: list[str]) -> None:
    from mlflow.utils.validation import _validate_metric_name

    sent = [metric_name(n) for n in names]
    assert len(set(sent)) == len(names)
    for name in sent:
        _validate_metric_name(name)
        assert len(name) <= 250
    assert all(a == b for a, b in zip(names, sent, strict=True) if a in ("情感", "新闻", "C__", "a/b", "_"))


def test_what_test_sets_are_of_is_said_as_far_as_a_tag_holds_it() -> None:
    assert note_of_sets([("a", ""), ("b", "")]) == ""
    assert note_of_sets([("split_0", "cat, dog"), ("b", "")]).endswith("\n\n- `split_0`: cat, dog\n")
    assert len(long := note_of_sets([(f"split_{i}", "a class, " * 20) for i in range(40)])) == 5000
    assert long.endswith("whole in summary.json)")


def test_runs_that_differ_in_their_seed_alone_are_of_one_group() -> None:
    params = {"seed": 0, "stream.seed": 0, "name": "er", "strategy.lr": 0.1, "tracking.uri": None}
    own = group_of("er", params)
    assert own.startswith("er ")
    assert group_of("er", {**params, "seed": 1, "stream.seed": 1, "tracking.uri": "x"}) == own
    for other in ({"strategy.lr": 0.2}, {"stream.seed": 5}, {"strategy.memory": 3}):
        assert group_of("er", {**params, **other}) != own


def test_a_parameter_that_is_cut_says_so() -> None:
    assert shortened("abc", 100) == "abc"
    cut = shortened("a" * 7000, 6000)
    assert len(cut) == 6000
    assert "config.yaml" in cut


def test_variables_of_mlflow_are_honoured(run_dir, monkeypatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "mine")
    assert store_of(TrackingSettings(), "runs") == ("http://127.0.0.1:1", "mine")
    assert store_of(TrackingSettings(uri="http://127.0.0.1:2", experiment="own"), "runs")[1] == "own"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "ftp://nowhere")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI"):
        store_of(TrackingSettings(), "runs")


def test_a_deleted_experiment_is_refused_before_anything_runs_and_says_what_to_do(run_dir) -> None:
    first = tracker(run_dir)
    write(run_dir, range(2))
    assert first.finish("FINISHED", []) is None
    store = client(run_dir)
    experiment = store.get_experiment_by_name("demo")
    store.delete_experiment(experiment.experiment_id)
    with pytest.raises(UserError, match=rf"restore it: .* --experiment-id {experiment.experiment_id}"):
        tracker(run_dir)
    store.restore_experiment(experiment.experiment_id)
    tracker(run_dir)


def test_a_run_lasts_as_long_in_mlflow_as_it_did(run_dir) -> None:
    begun = time.time()
    late = tracker(run_dir, age=5.0)
    write(run_dir, range(2))
    assert late.finish("FINISHED", []) is None
    info = stored_run(run_dir).info
    assert begun - 5.5 <= info.start_time / 1000 <= begun - 4
    assert 5 <= (info.end_time - info.start_time) / 1000 < time.time() - begun + 6


def client(run_dir: Path):
    from mlflow import MlflowClient

    return MlflowClient(read_state(run_dir)["uri"])


def stored_run(run_dir: Path):
    return client(run_dir).get_run(read_state(run_dir)["run_id"])


def steps_of(run_dir: Path, name: str = "train/loss") -> list[int]:
    return [m.step for m in client(run_dir).get_metric_history(read_state(run_dir)["run_id"], name)]


def wait_until(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def sent(run_dir: Path) -> bool:
    state = read_state(run_dir)
    return state is not None and state["offset"] == (run_dir / "metrics.jsonl").stat().st_size


# --- a local store ------------------------------------------------------------------------------------------------


def test_a_run_arrives_whole(run_dir, tmp_path):
    tracked = tracker(run_dir, params={f"option.{i}": "x" * 7000 if i == 0 else i for i in range(150)})
    tracked.start()
    write(run_dir, range(1, 2301))
    tracked.notify()
    write(run_dir, [1, 2], "average_accuracy", "experience")
    (run_dir / "config.yaml").write_text("seed: 0\n")
    (run_dir / "figures").mkdir()
    (run_dir / "figures" / "matrix.png").write_bytes(b"png")
    summary = {"experiences": [{}, {}], "metrics": {"average_accuracy": 2.0, "stability": 0.25, "h_mean": None},
               "cost": {"train_seconds": 3.5}}  # fmt: skip
    (run_dir / "summary.json").write_text(json.dumps(summary))
    artifacts = [run_dir / "config.yaml", run_dir / "summary.json", run_dir / "figures"]
    assert tracked.finish("FINISHED", artifacts) is None

    assert steps_of(run_dir) == list(range(1, 2301))
    assert steps_of(run_dir, "average_accuracy") == [1, 2]  # the summary repeats it: not logged again
    assert steps_of(run_dir, "stability") == [2]
    run = stored_run(run_dir)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["cost/train_seconds"] == 3.5
    assert "gone" not in run.data.metrics
    assert "h_mean" not in run.data.metrics
    assert run.data.metrics["system/system_memory_usage_percentage"] > 0
    assert len(run.data.params) == 150
    assert run.data.params["option.0"] == shortened("x" * 7000, 6000)
    assert run.data.tags["strategy"] == "er"
    assert run.data.tags["mine"] == "yes"
    assert [d.dataset.name for d in run.inputs.dataset_inputs] == ["digits/0"]
    found = {p.name for p in (tmp_path / "mlartifacts" / run.info.run_id / "artifacts").iterdir()}
    assert found == {"config.yaml", "summary.json", "figures"}
    assert read_state(run_dir)["done"]


def test_a_run_of_a_study_is_nested_under_it(run_dir):
    study = run_dir.parent
    nested.begin(study, TrackingSettings(experiment="demo"), study.parent, "study", "study", {"strategy": "er"})
    assert tracker(run_dir).finish("FINISHED", []) is None
    above = client(study).get_run(read_state(study)["run_id"])
    assert stored_run(run_dir).data.tags["mlflow.parentRunId"] == above.info.run_id
    assert (above.info.run_name, above.data.tags["clplat.kind"]) == ("study", "study")


def test_nothing_is_left_behind(run_dir):
    before, environment = set(threading.enumerate()), dict(os.environ)
    tracked = tracker(run_dir)
    tracked.start()
    write(run_dir, [1])
    assert tracked.finish("FAILED", []) is None
    assert set(threading.enumerate()) <= before
    changed = {k for k in environment.keys() | os.environ if environment.get(k) != os.environ.get(k)}
    assert not {k for k in changed if k.startswith("MLFLOW")}
    assert stored_run(run_dir).info.status == "FAILED"


def test_start_and_notify_return_at_once(run_dir):
    store.load()  # the first start of a process waits for MLflow's import
    tracked = tracker(run_dir)
    started = time.perf_counter()
    tracked.start()
    assert time.perf_counter() - started < 0.5
    started = time.perf_counter()
    for _ in range(1000):
        tracked.notify()
    assert time.perf_counter() - started < 0.5
    tracked.finish("FINISHED", [])


def test_resume_goes_on_with_the_same_run_and_repeats_no_step(run_dir):
    first = tracker(run_dir)
    first.start()
    write(run_dir, range(1, 11))
    first.finish("KILLED", [])
    run_id = read_state(run_dir)["run_id"]
    # The last checkpoint was at step 6: the file is cut back, and steps 7 to 10 come again, at other times.
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:6]))
    second = tracker(run_dir)
    second.start()
    write(run_dir, range(7, 15))
    assert second.finish("FINISHED", []) is None
    assert read_state(run_dir)["run_id"] == run_id
    assert steps_of(run_dir) == list(range(1, 15))
    assert stored_run(run_dir).info.status == "FINISHED"


def test_a_resumed_run_is_running_and_keeps_changed_parameters_as_tags(run_dir):
    tracker(run_dir).finish("KILLED", [])
    again = tracker(run_dir, params={"strategy.name": "er", "strategy.memory": 80, "new": 1})
    again.start()
    wait_until(lambda: "new" in stored_run(run_dir).data.params)
    run = stored_run(run_dir)
    assert run.info.status == "RUNNING"
    assert run.data.params == {"strategy.name": "er", "strategy.memory": "50", "new": "1"}
    assert run.data.tags["resumed.strategy.memory"] == "80"
    again.finish("FINISHED", [])


def test_a_lost_run_id_is_found_again(run_dir):
    tracker(run_dir).finish("KILLED", [])
    state = read_state(run_dir)
    (run_dir / "tracking.json").write_text(json.dumps({**state, "run_id": None}))
    tracker(run_dir).finish("FINISHED", [])
    assert read_state(run_dir)["run_id"] == state["run_id"]


def test_a_run_deleted_in_the_store_is_opened_anew_with_everything(run_dir):
    first = tracker(run_dir)
    write(run_dir, [1, 2])
    first.finish("KILLED", [])
    run_id = read_state(run_dir)["run_id"]
    client(run_dir).delete_run(run_id)
    again = tracker(run_dir)
    write(run_dir, [3])
    again.finish("FINISHED", [])
    assert read_state(run_dir)["run_id"] != run_id
    assert steps_of(run_dir) == [1, 2, 3]


def test_a_line_being_written_waits_and_a_torn_one_is_skipped(run_dir):
    tracked = tracker(run_dir)
    tracked.start()
    write(run_dir, [1])
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('{"axis": "step", "ste')
    tracked.notify()
    wait_until(lambda: (read_state(run_dir) or {"offset": 0})["offset"] > 0)
    assert not sent(run_dir)
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write("\n")
    write(run_dir, [2])
    tracked.finish("FINISHED", [])
    assert steps_of(run_dir) == [1, 2]


def test_names_that_mlflow_refuses_are_mended(run_dir):
    tracked = tracker(run_dir)
    write(run_dir, [1], "accuracy/task (1): é//x")
    assert tracked.finish("FINISHED", []) is None
    assert metric_name("accuracy/task (1): é//x") in stored_run(run_dir).data.metrics


def test_the_chart_layout_is_an_experiment_tag(run_dir):
    tracker(run_dir).finish("FINISHED", [])
    tags = client(run_dir).get_experiment_by_name("demo").tags
    assert json.loads(tags[charts.TAG])["state"].startswith("deflate;")
    assert len(charts.view()) < charts.LIMIT
    assert [charts.supported(v) for v in ("3.14.9", "3.15.0", "3.17.2", "4.0.0")] == [False, True, True, False]


def test_tracking_off_writes_nothing(tmp_path):
    run_dir = tmp_path / "runs" / "demo" / "0"
    run_dir.mkdir(parents=True)
    off = Tracker(run_dir, TrackingSettings(enabled=False), run_name="x", params={}, tags={}, datasets=[])
    off.start()
    off.notify()
    assert off.finish("FINISHED", []) is None
    assert list(tmp_path.rglob("*")) == [tmp_path / "runs", tmp_path / "runs" / "demo", run_dir]


def test_uris_are_absolute_whatever_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert default_uri("runs") == f"sqlite:///{tmp_path}/mlflow.db"
    assert absolute_uri("sqlite:///a/b.db") == f"sqlite:///{tmp_path}/a/b.db"
    assert absolute_uri("http://127.0.0.1:5000") == "http://127.0.0.1:5000"
    with pytest.raises(UserError, match=r"tracking\.uri .*: './mlruns' is no tracking store"):
        absolute_uri("./mlruns")


# --- a store that is away -----------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_offline_keeps_everything_and_sends_it_later(run_dir, tmp_path, monkeypatch):
    monkeypatch.setattr("clplat.tracking.client.LAST_ATTEMPTS", 1)
    tracked = tracker(run_dir, f"http://127.0.0.1:{free_port()}")
    tracked.start()
    write(run_dir, range(1, 6))
    note = tracked.finish("FINISHED", [], timeout_seconds=20)
    assert note is not None
    assert "\n" not in note
    assert "not everything reached http://127.0.0.1" in note
    assert pending(tmp_path) == [run_dir]
    # The same run, with the store where it can be reached.
    state = read_state(run_dir)
    (run_dir / "tracking.json").write_text(json.dumps({**state, "uri": f"sqlite:///{tmp_path}/mlflow.db"}))
    assert send_pending(run_dir)
    assert not send_pending(run_dir)
    assert pending(tmp_path) == []
    assert steps_of(run_dir) == [1, 2, 3, 4, 5]
    assert stored_run(run_dir).info.status == "FINISHED"


def test_a_store_that_never_answers_does_not_hold_the_run(run_dir):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        tracked = tracker(run_dir, f"http://127.0.0.1:{silent.getsockname()[1]}")
        tracked.start()
        started = time.monotonic()
        note = tracked.finish("FINISHED", [], timeout_seconds=1.5)
        assert time.monotonic() - started < 5
    assert note is not None
    assert "no answer within 1.5 s" in note
    wait_until(lambda: not tracked._thread.is_alive(), 60)


def test_a_run_of_a_sweep_waits_for_no_slow_server(tmp_path):
    """The next run begins, and the next one's trial; what is left is sent when the study ends."""
    study, trial, run_dir = tmp_path / "runs" / "study", Path("trial-0"), Path("trial-0/seed-0")
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        settings = TrackingSettings(uri=f"http://127.0.0.1:{silent.getsockname()[1]}", experiment="demo")
        for folder, kind in ((study, "study"), (study / trial, "trial")):
            nested.begin(folder, settings, tmp_path / "runs", kind, folder.name, {})
        (study / run_dir).mkdir()
        tracked = tracker(study / run_dir, settings.uri)
        note = tracked.finish("FINISHED", [], timeout_seconds=60)
        with locked(study):  # as the sender has it while it opens the study's run
            again = (study, settings, tmp_path / "runs", "study", "study", {})
            thread = threading.Thread(target=nested.begin, args=again)
            thread.start()
            thread.join(20)
            held_up = thread.is_alive()
        thread.join()
    assert not held_up
    assert note is not None
    assert "no answer within 2 s" in note
    wait_until(lambda: not tracked._thread.is_alive(), 60)


def test_a_password_is_not_shown(run_dir, monkeypatch):
    monkeypatch.setattr("clplat.tracking.client.LAST_ATTEMPTS", 1)
    note = tracker(run_dir, f"http://me:secret@127.0.0.1:{free_port()}").finish("FINISHED", [], timeout_seconds=20)
    assert note is not None
    assert "secret" not in note


# --- processes ----------------------------------------------------------------------------------------------------

CHILD = """
    import json, sys, time
    from pathlib import Path
    from clplat.config.settings import TrackingSettings
    from clplat.tracking.client import Tracker

    run_dir, steps, linger = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
    run_dir.mkdir(parents=True, exist_ok=True)
    tracker = Tracker(run_dir, TrackingSettings(experiment="demo"), run_name="demo", params={"a": 1}, tags={},
                      datasets=[])
    tracker.start()
    with open(run_dir / "metrics.jsonl", "a") as file:
        for step in range(1, steps + 1):
            row = {"axis": "step", "step": step, "time": time.time(), "metrics": {"train/loss": step}}
            file.write(json.dumps(row) + "\\n")
    tracker.notify()
    time.sleep(linger)
    print(tracker.finish("FINISHED", [], timeout_seconds=120))
"""


def child(run_dir: Path, steps: int, linger: float = 0.0) -> subprocess.Popen:
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(CHILD), str(run_dir), str(steps), str(linger)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_after_kill_9_a_second_tracker_goes_on(run_dir):
    process = child(run_dir, 5, linger=60)
    try:
        wait_until(lambda: (run_dir / "metrics.jsonl").exists() and sent(run_dir))
    finally:
        process.kill()
        process.communicate()
    assert stored_run(run_dir).info.status == "RUNNING"
    first = read_state(run_dir)
    # The worst moment: the store has the points, tracking.json does not know, and the steps come again later.
    (run_dir / "tracking.json").write_text(json.dumps({**first, "offset": 0, "tail": ""}))
    write(run_dir, range(4, 9), mode="w")
    assert tracker(run_dir).finish("FINISHED", []) is None
    assert read_state(run_dir)["run_id"] == first["run_id"]
    assert steps_of(run_dir) == list(range(1, 9))


@pytest.mark.slow
def test_runs_at_the_same_time_share_a_new_sqlite_store(tmp_path):
    run_dirs = [tmp_path / "runs" / "demo" / str(seed) for seed in range(4)]
    processes = [child(run_dir, 3000) for run_dir in run_dirs]
    notes = [p.communicate(timeout=200)[0].strip() for p in processes]
    assert notes == ["None"] * 4
    assert all(steps_of(run_dir) == list(range(1, 3001)) for run_dir in run_dirs)
    assert len(client(run_dirs[0]).search_experiments()) == 2  # ours and MLflow's own


# --- a real server ------------------------------------------------------------------------------------------------


class Server:
    """An MLflow server on its own store, that can be killed and started again on the same port."""

    def __init__(self, folder: Path, database: Path) -> None:
        shutil.copy(database, folder / "mlflow.db")
        self.folder, self.port = folder, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        command = [sys.executable, "-W", "ignore", "-m", "mlflow", "server", "--workers", "1", "--port", str(self.port),
                   "--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db",
                   "--artifacts-destination", str(self.folder / "artifacts")]  # fmt: skip
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        wait_until(self.answers, 120)

    def answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.uri}/health", timeout=2) as answer:
                return answer.status == 200
        except OSError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture(scope="module")
def server(tmp_path_factory, prepared):
    one = Server(tmp_path_factory.mktemp("server"), prepared)
    one.start()
    yield one
    one.kill()


@pytest.mark.slow
def test_a_server_killed_and_started_again_misses_nothing_and_gets_nothing_twice(run_dir, server):
    (run_dir / "report.html").write_text("<p>report</p>")
    tracked = tracker(run_dir, server.uri)
    tracked.start()
    write(run_dir, range(1, 1501))
    tracked.notify()
    wait_until(lambda: sent(run_dir), 60)
    server.kill()
    write(run_dir, range(1501, 3001))
    tracked.notify()
    time.sleep(3)
    assert tracked._thread.is_alive()
    assert not sent(run_dir)
    server.start()
    write(run_dir, range(3001, 3101))
    assert tracked.finish("FINISHED", [run_dir / "report.html"], timeout_seconds=60) is None
    assert steps_of(run_dir) == list(range(1, 3101))
    run = stored_run(run_dir)
    assert run.info.status == "FINISHED"
    assert [a.path for a in client(run_dir).list_artifacts(run.info.run_id)] == ["report.html"]


@pytest.mark.slow
def test_what_a_dead_server_missed_is_sent_when_it_is_back(run_dir, server):
    server.kill()
    tracked = tracker(run_dir, server.uri)
    tracked.start()
    write(run_dir, range(1, 11))
    note = tracked.finish("FINISHED", [], timeout_seconds=30)
    server.start()
    assert note is not None
    assert send_pending(run_dir)
    assert steps_of(run_dir) == list(range(1, 11))
    assert stored_run(run_dir).info.status == "FINISHED"


# --- what a store holds ---------------------------------------------------------------------------------------------

SUMMARY = {"strategy": "er", "metrics": {"average_accuracy": 0.75}, "accuracy_matrix": [[0.5]], "experiences": [{}]}


def held(run_dir: Path, uri: str | None = None, experiment: str | None = None):
    found = open_store(absolute_uri(uri or default_uri(run_dir.parents[1])))
    return found, *held_runs(found, experiment)


@pytest.mark.slow
def test_a_store_gives_back_what_runs_measured(run_dir) -> None:
    """One run ended with its files, one ended without, one has not ended, one is not ours, one was deleted."""
    params = {
        "strategy.name": "er",
        "strategy.memory": 50,
        "strategy.tags": ["a"],
        "stream.path": "x" * 7000,
        "seed": 0,
    }
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    (run_dir / "config.yaml").write_text("{strategy: {name: er, memory: 50}, stream: {path: whole}}")
    (run_dir / "report.html").write_text("")
    first = tracker(run_dir, params=params)
    write(run_dir, range(1, 2001), "anytime/digits 0, 1")
    write(run_dir, [7], "average_accuracy", axis="experience")
    assert first.finish("FINISHED", [run_dir / n for n in ("summary.json", "config.yaml", "report.html")]) is None
    for seed, end in (("1", {"status": "KILLED", "artifacts": [], "time": time.time()}), ("2", None)):
        other = run_dir.with_name(seed)
        other.mkdir()
        follows = tracker(other, params={"strategy.name": "er", "strategy.memory": 50})
        write(other, [1, 2], "forgetting", axis="experience")
        follows.state["finish"] = end
        sender = store.RunSender(other, follows.state, lambda: None, reopen=False)
        sender.send(system=False)
        if end is not None:
            sender.close()
    mlflow = client(run_dir)
    experiment = mlflow.get_experiment_by_name("demo").experiment_id
    mlflow.create_run(experiment)
    study = mlflow.create_run(experiment, tags={"clplat.sweep": "k", "clplat.kind": "study"}).info.run_id
    mlflow.log_text(study, '{"study": "s1"}', "sweep.json")
    mlflow.create_run(experiment, tags={"clplat.sweep": "t", "clplat.kind": "trial"})
    mlflow.delete_run(mlflow.create_run(experiment).info.run_id)

    found, (whole, killed, under_way), notes, studies = held(run_dir)
    assert notes == ["1 runs of the store were not made by clplat.",
                     "1 runs that have ended are shown by their metrics alone: "
                     "summary.json is not with them."]  # fmt: skip
    assert studies == [{"study": "s1"}]
    assert {k: whole[k] for k in SUMMARY} == SUMMARY
    assert whole["config"] == {"strategy": {"name": "er", "memory": 50}, "stream": {"path": "whole"}}  # one was cut
    assert (whole["tags"], whole["seed"], whole["status"], whole["report"].name) == ({"mine": "yes"}, 0, "complete",
                                                                                     "report.html")  # fmt: skip
    assert [r["status"] for r in (killed, under_way)] == ["interrupted", "running"]
    assert killed["metrics"] == under_way["metrics"] == {"forgetting": 2.0}
    assert killed["config"] == {"strategy": {"name": "er", "memory": 50}}
    assert killed["report"] is None
    ids = [whole["run_id"], killed["run_id"]]
    curves = found.curves(ids, ["anytime/digits 0, 1", "train/loss"])
    ((key, points),) = curves.items()
    assert key == (whole["run_id"], "anytime/digits 0, 1")
    assert POINTS / 2 <= len(points) <= POINTS
    assert points[0] == (8.0, 8.0)  # the mean of steps 1 to 15: stretches of 16 begin at 0
    assert [x for x, _ in points] == sorted(x for x, _ in points)
    assert all(x == pytest.approx(y) for x, y in points)
    assert held(run_dir, experiment="demo")[1] == [whole, killed, under_way]
    with pytest.raises(
        UserError, match=r"--experiment dmo: no runs in an experiment of this name \(did you mean demo\?\)"
    ):
        held(run_dir, experiment="dmo")


def test_what_is_no_store_is_told_in_one_line(tmp_path) -> None:
    with pytest.raises(MissingError, match=r"^dashboard: there is no store .*none.db \(valid: "):
        open_store(f"sqlite:///{tmp_path / 'none.db'}")
    for name, content in (("text.db", b"no database" * 99), ("empty.db", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=r"no store of MLflow's that can be read \([^\n]*\)$"):
            held_runs(open_store(f"sqlite:///{tmp_path / name}"))


@pytest.mark.slow
def test_a_server_gives_the_same_as_its_database(run_dir, server) -> None:
    (run_dir / "summary.json").write_text(json.dumps(SUMMARY))
    tracked = tracker(run_dir, server.uri, experiment="seen")
    write(run_dir, range(1, 101))
    assert tracked.finish("FINISHED", [run_dir / "summary.json"], timeout_seconds=60) is None
    over_http, (one,), *_ = held(run_dir, server.uri, "seen")
    assert one["accuracy_matrix"] == [[0.5]]
    assert one["report"].startswith(f"{server.uri}/#/experiments/")
    inside, (same,), *_ = held(run_dir, f"sqlite:///{server.folder}/mlflow.db", "seen")
    assert all(same[k] == one[k] for k in ("run_id", "config", "tags", "metrics", "status", "started", "seconds"))
    assert over_http.curves([one["run_id"]], ["train/loss"]) == inside.curves([one["run_id"]], ["train/loss"])


@pytest.mark.slow
def test_a_server_killed_in_the_middle_of_a_sweep_has_all_of_it_when_it_is_back(tmp_path, server, monkeypatch):
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.setattr("clplat.tracking.client.NESTED_SECONDS", 30.0)
    monkeypatch.setattr("clplat.tracking.client.PATIENCE_SECONDS", 1.0)
    monkeypatch.setattr("clplat.tracking.client.LAST_ATTEMPTS", 1)
    calls, original = [], launch.launch

    def interfered(*args, **options):
        calls.append(args)
        if len(calls) == 2:  # the first run is in the store, with study and trial above it
            server.kill()
        if len(calls) == 4:
            server.start()
        return original(*args, **options)

    monkeypatch.setattr(launch, "launch", interfered)
    section = {"trials": 2, "seeds": [0, 1], "give_up": "never"}
    stream = {"name": "digits", "train_per_class": 20, "test_per_class": 5, "validation": 0.2}
    result = sweep(
        sweeping.write(tmp_path, section, stream=stream, loop={"max_steps": 2, "representation": False},
                       tracking={"uri": server.uri, "experiment": "swept"}), quiet=True)  # fmt: skip
    assert len(calls) == 4
    assert pending(result.folder) == []
    folders = [result.folder, *sorted(result.folder.glob("trial-*")), *sorted(result.folder.glob("trial-*/seed-*"))]
    found = {folder: stored_run(folder) for folder in folders}
    assert len(found) == 1 + 2 + 2 * 2
    for folder, run in found.items():
        assert run.info.status == "FINISHED"
        above = found.get(folder.parent)
        assert run.data.tags.get("mlflow.parentRunId") == (above and above.info.run_id)
        assert {"average_accuracy", "valid/average_accuracy"} & run.data.metrics.keys()
        lines = (folder / "metrics.jsonl").read_text().splitlines() if "seed" in folder.name else []
        logged = [(row["step"], row["metrics"]["train/loss"]) for row in map(json.loads, lines)
                  if "train/loss" in row["metrics"]]  # fmt: skip
        history = client(folder).get_metric_history(run.info.run_id, "train/loss")
        assert [(m.step, m.value) for m in history] == logged


def test_the_lock_of_a_store_is_there_only_while_it_is_held(tmp_path):
    """Ten threads count up one number, each reading and writing it under the lock."""
    uri, counter = f"sqlite:///{tmp_path / 'mlflow.db'}", [0]

    def count():
        for _ in range(20):
            with store._alone(uri):
                assert (tmp_path / ".mlflow.db.lock").exists()
                seen = counter[0]
                time.sleep(0.0005)
                counter[0] = seen + 1

    threads = [threading.Thread(target=count) for _ in range(10)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert counter == [200]
    assert list(tmp_path.iterdir()) == []


IMPORTS = """
import sys
from pathlib import Path
from clplat.config.settings import TrackingSettings
from clplat.tracking.client import Tracker
folder = Path(sys.argv[1])
tracker = Tracker(folder, TrackingSettings(), run_name="demo", params={}, tags={}, datasets=[])
tracker.start()
before = set(sys.modules)
tracker.finish("FINISHED", [])
print(len([m for m in before if m.startswith("mlflow")]), len([m for m in set(sys.modules) - before if "mlflow" in m]))
"""


def test_mlflow_is_imported_before_the_thread_runs_beside_the_steps(run_dir):
    command = [sys.executable, "-W", "ignore", "-c", IMPORTS, str(run_dir)]
    there, later = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert there > 100 > 10 > later
