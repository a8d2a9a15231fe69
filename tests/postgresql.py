"""A PostgreSQL server of one test module's own, from the programs of the system's packages."""

import contextlib
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

PASSWORD = "tell-nobody"
DEBIAN = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)


class Server:
    """Started and stopped as often as asked; keeps its data and its port."""

    def __init__(self, programs: Path, data: Path, user: list[str]) -> None:
        self.programs, self.data, self.user = programs, data, user
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]

    def url(self, password: str = PASSWORD, database: str = "postgres", driver: str = "") -> str:
        return f"postgresql{driver}://clplat:{password}@127.0.0.1:{self.port}/{database}"

    def run(self, program: str, *arguments: str) -> None:
        command = [*self.user, str(self.programs / program), "-D", str(self.data), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, cwd=self.data, timeout=60)
        assert done.returncode == 0, done.stderr + done.stdout

    def start(self) -> None:
        options = f"-p {self.port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
        self.run("pg_ctl", "start", "-w", "-l", str(self.data / "log"), "-o", options)

    def stop(self) -> None:
        self.run("pg_ctl", "stop", "-w", "-m", "fast")


@contextlib.contextmanager
def server() -> Iterator[Server]:
    """A running server; skips where there are no programs, or root has no one to run it as."""
    found = shutil.which("initdb")
    programs = next(iter(DEBIAN), Path(found).resolve().parent if found else None)
    if programs is None or not (programs / "pg_ctl").is_file():
        pytest.skip("PostgreSQL's programs initdb and pg_ctl are not installed")
    user: list[str] = []
    data = Path(tempfile.mkdtemp(prefix="clplat-postgresql-"))
    try:
        if os.getuid() == 0:  # as whom the server refuses to run
            if shutil.which("setpriv") is None:
                pytest.skip("PostgreSQL does not run as root, and setpriv is not installed")
            nobody = pwd.getpwnam("nobody")
            os.chown(data, nobody.pw_uid, nobody.pw_gid)
            user = ["setpriv", f"--reuid={nobody.pw_uid}", f"--regid={nobody.pw_gid}", "--clear-groups"]
        one = Server(programs, data, user)
        secret = data.with_suffix(".password")
        secret.write_text(PASSWORD)
        os.chmod(secret, 0o644)
        one.run("initdb", "-A", "scram-sha-256", "-U", "clplat", f"--pwfile={secret}", "--no-sync", "-E", "UTF8")
        secret.unlink()
        one.start()
        try:
            yield one
        finally:
            with contextlib.suppress(AssertionError):
                one.stop()
    finally:
        shutil.rmtree(data)
