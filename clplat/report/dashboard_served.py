"""The dashboard on 127.0.0.1: read anew at each visit, filtered by the address, a run's report one click away."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Mapping, Sequence
from hashlib import sha256
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

from clplat.errors import ClplatError, UserError
from clplat.files import write_atomic
from clplat.report.dashboard import Run, Source, view
from clplat.report.dashboard_page import build_dashboard, size_note, wanted_of

HOST = "127.0.0.1"


def write_dashboard(source: Source, wanted: Mapping[str, Sequence[str]], file: Path) -> Path:
    """The page as one file; reports are linked where they lie.

    Raises:
        UserError: no runs, or the file can't be written.
    """

    def link(run: Run) -> str | None:
        report = run.get("report")
        if not isinstance(report, Path):
            return report
        return quote(Path(os.path.relpath(report, file.absolute().parent)).as_posix())

    page = build_dashboard(view(source, wanted), link, served=False)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(file, page)
    except OSError as error:
        raise UserError(f"dashboard: --output {file}: can't be written ({error.strerror})") from error
    if note := size_note(page):
        print(f"clplat: dashboard: {note}", file=sys.stderr)
    return file


def make_server(source: Source, wanted: Mapping[str, Sequence[str]], port: int) -> ThreadingHTTPServer:
    """A server on this machine's own address that shows `wanted` until another choice is made.

    Args:
        port: 0 takes a free one.

    Raises:
        UserError: the port is taken or none; there are no runs, or none that is wanted.
    """
    if not 0 <= port <= 65535:
        raise UserError(f"dashboard: --port {port}: is out of range (valid: 0..65535)")
    view(source, wanted)
    handler = type("Handler", (_Handler,), {"pages": _Pages(source, wanted)})
    try:
        return ThreadingHTTPServer((HOST, port), handler)
    except OSError as error:
        raise UserError(f"dashboard: can't listen on {HOST}:{port}: {error.strerror} (another: --port N)") from error


class _Pages:
    """What a server answers with; one reading at a time."""

    def __init__(self, source: Source, wanted: Mapping[str, Sequence[str]]) -> None:
        self.source, self.first = source, dict(wanted)
        self.reports: dict[str, Path] = {}
        self.lock = threading.Lock()

    def dashboard(self, query: str) -> str:
        """The page for an address; one without a question shows what the command was asked for."""
        wanted = wanted_of(parse_qs(query, keep_blank_values=True)) if query else self.first
        with self.lock:
            return build_dashboard(view(self.source, wanted), self._link, served=True)

    def _link(self, run: Run) -> str | None:
        report = run.get("report")
        if not isinstance(report, Path):
            return report
        key = sha256(str(report).encode()).hexdigest()[:16]
        self.reports[key] = report
        return f"/report/{key}"


class _Handler(BaseHTTPRequestHandler):
    """GET alone; answers only to this machine's own names, so that no other site's page can read it."""

    pages: _Pages

    def do_GET(self) -> None:
        """The dashboard, or a run's report."""
        if self.headers.get("Host", "").rpartition(":")[0] not in (HOST, "localhost"):
            return self._send(403, "Open it as http://127.0.0.1")
        parts = urlsplit(self.path)
        if parts.path == "/":
            return self._page(parts.query)
        if parts.path == "/favicon.ico":
            return self._send(204, "")
        file = self.pages.reports.get(parts.path.removeprefix("/report/"))
        try:
            found = None if file is None else file.read_text(encoding="utf-8")
        except OSError:
            found = None
        return (
            self._send(404, "There is no such report: open the dashboard anew.")
            if found is None
            else self._send(200, found, "text/html")
        )

    def _page(self, query: str) -> None:
        try:
            self._send(200, self.pages.dashboard(query), "text/html")
        except ClplatError as error:
            back = f'<p>{escape(str(error))}</p><p><a href="/?">All runs</a></p>'
            self._send(400, f"<!doctype html><html lang=en><title>clplat dashboard</title>{back}", "text/html")

    def _send(self, code: int, content: str, kind: str = "text/plain") -> None:
        body = content.encode()
        self.send_response(code)
        headers = {"Content-Type": f"{kind}; charset=utf-8", "Content-Length": str(len(body)),
                   "Cache-Control": "no-store", "X-Content-Type-Options": "nosniff"}  # fmt: skip
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""
