"""`clplat ui`: the command line it starts, and a real server seen from outside."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import psutil
import pytest
import yaml

from clplat.errors import UserError
from clplat.tracking import server

FOLDER = Path(__file__).parent.parent / "mlflow"


def listening(pid: int) -> set[str]:
    """Addresses on which a process and its children listen."""
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    return {c.laddr.ip for p in family for c in p.net_connections() if c.status == psutil.CONN_LISTEN}


def test_the_server_is_small_and_keeps_artifacts_beside_the_store():
    line = server.command("sqlite:////data/mlflow.db", "127.0.0.1", 5001)
    assert line[line.index("--workers") + 1] == "1"
    assert line[line.index("--host") + 1] == "127.0.0.1"
    assert line[line.index("--artifacts-destination") + 1] == "/data/mlartifacts"


def test_a_taken_port_is_one_line():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(UserError, match=rf"can't listen on 127\.0\.0\.1:{port}: .*--port N"):
            server.serve(port=port)


def test_of_another_server_only_the_link_is_printed(tmp_path, capsys):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        base = f"http://127.0.0.1:{probe.getsockname()[1]}"
    assert server.serve(tmp_path, uri=base) == 0
    assert capsys.readouterr().out == f"{base}/#/experiments?workflowType=machine_learning\n"


def test_an_experiment_that_is_not_there_is_told_with_those_that_are(monkeypatch, capsys):
    def get(address, key="experiment"):
        if key == "experiments":
            return [{"name": "Default"}, {"name": "clplat"}]
        if "experiment_name=clplat" in address:
            return {"experiment_id": "7"}
        raise urllib.error.HTTPError(address, 404, "no", None, None)

    monkeypatch.setattr(server, "_get", get)
    assert "/#/experiments/7/runs?workflowType=machine_learning" in server._link("http://x", "clplat", True)
    assert capsys.readouterr().err == ""
    assert server._link("http://x", "clplt", True) == "http://x/#/experiments?workflowType=machine_learning"
    assert capsys.readouterr().err == "clplat: ui: no experiment 'clplt' in this store (there are: Default, clplat)\n"
    server._link("http://x", "mine", False)  # the default: nothing was tracked yet
    assert capsys.readouterr().err == ""


def test_a_server_that_does_not_start_tells_why(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "command", lambda *_: [sys.executable, "-c", "raise SystemExit('no such store')"])
    with pytest.raises(UserError, match=r"did not start: no such store"):
        server.serve(tmp_path / "runs", port=0)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("10.0.0.1", False), ("box", False)],
)
def test_what_counts_as_this_machine(host, loopback):
    assert server._is_loopback(host) == loopback


def test_another_host_is_said_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(server, "command", lambda *_: [sys.executable, "-c", ""])
    with pytest.raises(UserError, match="did not start"):
        server.serve(tmp_path / "runs", host="0.0.0.0", port=0)
    assert "listening on 0.0.0.0: whoever reaches this machine" in capsys.readouterr().err


@pytest.mark.slow
def test_a_real_server_listens_here_only_and_stops_with_us(tmp_path):
    code = f"from clplat.tracking.server import serve; raise SystemExit(serve({str(tmp_path / 'runs')!r}, port=0))"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        link = process.stdout.readline().strip()
        assert link.startswith("http://127.0.0.1:")
        assert link.endswith("#/experiments?workflowType=machine_learning")
        with urllib.request.urlopen(link.partition("#")[0], timeout=20) as page:
            assert page.status == 200
        family = psutil.Process(process.pid).children(recursive=True)
        assert listening(process.pid) == {"127.0.0.1"}
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
        assert psutil.wait_procs(family, 10)[1] == []
    finally:
        process.kill()
        process.stdout.close()
    assert (tmp_path / "mlflow.db").exists()


# --- the folder mlflow/ -------------------------------------------------------------------------------------------


def test_the_folder_mlflow_never_shadows_the_package():
    assert not list(FOLDER.rglob("*.py"))


def test_every_published_port_is_bound_to_this_machine():
    services = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_the_project_calls_commands_that_exist():
    from clplat.cli import COMMANDS

    points = yaml.safe_load((FOLDER / "MLproject").read_text())["entry_points"]
    for point in points.values():
        words = point["command"].split()
        assert words[0] == "clplat"
        assert words[1] in COMMANDS
        assert set(re.findall(r"{(\w+)}", point["command"])) == set(point["parameters"])


@pytest.mark.slow
def test_the_start_script_listens_here_only(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {**os.environ, "PORT": str(port), "FOLDER": str(tmp_path / "store"), "PYTHON": sys.executable}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(["sh", FOLDER / "server.sh"], env=environment, stdout=log, stderr=log)
    try:
        end = time.monotonic() + 120
        while not server._answers(f"http://127.0.0.1:{port}"):
            assert process.poll() is None, (tmp_path / "log").read_text()
            assert time.monotonic() < end
            time.sleep(0.2)
        assert listening(process.pid) == {"127.0.0.1"}
        assert (tmp_path / "store" / "mlflow.db").exists()
    finally:
        process.terminate()
        process.wait(20)
