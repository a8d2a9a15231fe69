"""A study on a PostgreSQL server: what refuses it, what is never shown, and a server that goes away and comes back."""

import json
import threading
import time

import postgresql
import pytest
from sweeping import objective, write

from clplat.errors import ClplatError, MissingError, UserError
from clplat.sweep import server as storage_server
from clplat.sweep.server import without_password
from clplat.sweep.study import sweep

SECRET = postgresql.PASSWORD


@pytest.fixture(scope="module")
def server():
    with postgresql.server() as one:
        yield one


@pytest.fixture
def running(server):
    """Each test begins with a server that runs, whatever the one before did to it."""
    try:
        yield server
    finally:
        server.stop()
        server.start()


def named(tmp_path, url, study, **section):
    return write(tmp_path, {"storage": url, "study": study, **section})


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://me:tell-nobody@host:1/db", "postgresql://me:***@host:1/db"),
        ("postgresql+psycopg://me:tell:no@body/x@host/db", "postgresql+psycopg://me:***@host/db"),
        ("postgresql://host/db?user=me&password=tell-nobody&x=1", "postgresql://host/db?user=me&password=***&x=1"),
        ("postgresql://me@host/db", "postgresql://me@host/db"),
        ("sqlite:////a:b@c/study.db", "sqlite:////a:b@c/study.db"),
        ("no:url@at.all", "no:url@at.all"),
    ],
)
def test_a_url_is_shown_without_its_password(url, shown):
    assert without_password(url) == shown


@pytest.mark.parametrize(
    ("url", "error", "fault"),
    [
        ("postgresql://me:tell-nobody@127.0.0.1:port/db", UserError, r"is no database URL \(valid: as sqlite"),
        ("postgresql+psycopg2://me:tell-nobody@h/db", MissingError, "needs the Python package psycopg2, which is not"),
        ("postgresql://me:tell-nobody@127.0.0.1:1/db", UserError, r"Connection refused.* \(is the server up, and are"),
    ],
)
def test_a_server_that_is_not_there(tmp_path, url, error, fault):
    with pytest.raises(error, match=rf"^sweep\.storage: 'postgresql.*me:\*\*\*@.*{fault}") as caught:
        sweep(write(tmp_path, {"storage": url}), run=objective, quiet=True)
    assert len(caught.value.faults) == 1
    assert SECRET not in str(caught.value)


def test_without_the_driver_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "psycopg", None)  # what an import of it meets where it is missing
    with pytest.raises(
        MissingError, match=r"needs the Python package psycopg, .* \(pip install 'clplat\[postgresql\]'"
    ):
        sweep(write(tmp_path, {"storage": "postgresql://me@h/db"}), run=objective, quiet=True)


@pytest.mark.slow
def test_a_study_in_a_database_goes_on_and_never_shows_its_password(tmp_path, server, capfd):
    url = server.url(driver="+psycopg")
    path = named(tmp_path, url, "whole")
    assert len(sweep(path, run=objective).trials) == 4
    result = sweep(named(tmp_path, server.url(), "whole", trials=6), run=objective)  # one server, however it is written
    assert [t["state"] for t in result.trials] == ["complete"] * 6
    other = named(tmp_path, url, "whole", metric="plasticity")
    with pytest.raises(UserError, match="has another configuration or space") as changed:
        sweep(other, run=objective)
    with pytest.raises(UserError, match="to join") as missing:
        sweep(named(tmp_path, url, "none"), run=objective, join=True)
    written = "".join(f.read_text() for f in (tmp_path / "runs").rglob("*") if f.is_file())
    out, err = capfd.readouterr()
    assert SECRET not in out + err + written + str(changed.value) + str(missing.value)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "fault"),
    [({"password": "wrong"}, "password authentication failed"), ({"database": "none"}, '"none" does not exist')],
)
def test_what_a_server_refuses(tmp_path, server, wrong, fault):
    with pytest.raises(UserError, match=rf"^sweep\.storage: .*clplat:\*\*\*@.* can't be used: .*{fault}") as caught:
        sweep(named(tmp_path, server.url(**wrong), "refused"), run=objective, quiet=True)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_a_server_that_restarts_is_waited_for(tmp_path, running, capsys):
    def run(config, run_dir):
        if not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            running.stop()
            later = threading.Timer(1.5, running.start)
            later.start()
            ran.append(later)
        return objective(config, run_dir)

    ran = []
    result = sweep(named(tmp_path, running.url(), "restarted"), run=run)
    ran[0].join()
    assert [t["state"] for t in result.trials] == ["complete"] * 4
    assert capsys.readouterr().err.count("the study's storage does not answer; trying for 60 s") == 1


@pytest.mark.slow
def test_a_server_that_stays_away_ends_it_in_one_line_and_the_same_command_goes_on(tmp_path, running, monkeypatch):
    monkeypatch.setattr(storage_server, "PATIENCE", 1.0)
    ran = []

    def run(config, run_dir):
        ran.append(run_dir.parent.name)
        if len(ran) == 2:
            running.stop()
        return objective(config, run_dir)

    path = named(tmp_path, running.url(), "away")
    began = time.monotonic()
    with pytest.raises(ClplatError, match=r"can't be used any more: .* \(the same command goes on") as caught:
        sweep(path, run=run, quiet=True)
    assert time.monotonic() - began < 30
    assert len(caught.value.faults) == 1
    assert "\n" not in str(caught.value)
    assert SECRET not in str(caught.value)
    running.start()
    result = sweep(path, run=run, quiet=True)
    complete = [t for t in result.trials if t["state"] == "complete"]
    assert len(complete) == 4
    assert json.loads((result.folder / "sweep.json").read_text())["effort"].startswith("4 trials, 4 runs")
    assert all("reason" not in t or t["reason"] is None for t in result.trials)  # an outage is no fault of a trial
