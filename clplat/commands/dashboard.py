"""`clplat dashboard`: strategies over streams on one page, served on this machine or written as a file."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.commands.arguments import Parser
from clplat.errors import UserError

if TYPE_CHECKING:
    from clplat.report.data import Log
    from clplat.tracking.held import Store


def configure(parser: Parser) -> None:
    parser.usage = "clplat dashboard [RUNS ...] [--uri URI] [--output FILE.html] [--stream NAME] [--strategy NAME] ..."
    parser.add_argument("runs", nargs="*", metavar="RUNS", help="folders of runs; none: what the MLflow store holds")
    parser.add_argument("--uri", help="the store (default: $MLFLOW_TRACKING_URI, or mlflow.db beside runs/)")
    parser.add_argument("--experiment", metavar="NAME", help="MLflow experiment (default: all)")
    for facet, of in (("stream", "NAME"), ("strategy", "NAME"), ("commit", "HASH"), ("tag", "KEY=VALUE")):
        text = "only these runs; may be given again"
        parser.add_argument(f"--{facet}", metavar=of, action="append", default=[], help=text)
    parser.add_argument("--output", metavar="FILE.html", help="write one file instead of serving")
    parser.add_argument("--port", type=int, default=8050, help="0 takes a free one (default: 8050)")


def main(args: argparse.Namespace) -> int:
    from clplat.report.dashboard_served import make_server, write_dashboard

    if args.output is not None and Path(args.output).suffix not in (".html", ".htm"):
        raise UserError(f"dashboard: --output {args.output}: is no name of a page (valid: FILE.html)")
    source, wanted = _source(args), {facet: getattr(args, facet) for facet in ("stream", "strategy", "commit", "tag")}
    if args.output is not None:
        print(f"dashboard: {write_dashboard(source, wanted, Path(args.output))}")
        return 0
    from clplat.tracking.server import stops_on_sigterm

    server = make_server(source, wanted, args.port)
    print(f"http://127.0.0.1:{server.server_port}\nCtrl-C stops the server.", flush=True)
    with server, stops_on_sigterm():
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            return 0
    return 0


def _source(args: argparse.Namespace) -> Any:
    if args.runs:
        from clplat.report.dashboard import Folders

        if aside := [f"--{k}" for k in ("uri", "experiment") if getattr(args, k) is not None]:
            raise UserError(f"dashboard: {aside[0]} has no meaning beside folders of runs")
        return Folders([Path(folder) for folder in args.runs])
    from clplat.tracking.client import absolute_uri, default_uri, without_password
    from clplat.tracking.held import open_store

    uri = absolute_uri(args.uri or default_uri("runs"))
    return Stored(open_store(uri), without_password(uri), args.experiment)


class Stored:
    """Runs as an MLflow store holds them."""

    def __init__(self, store: Store, name: str, experiment: str | None) -> None:
        self.store, self.experiment = store, experiment
        self.known: list[dict[str, Any]] = []
        self.name = name + (f", experiment {experiment}" if experiment else "")

    def read(self) -> tuple[list[dict[str, Any]], list[str]]:
        """Summaries of its runs."""
        from clplat.report.compare import start_of
        from clplat.tracking.held import held_runs

        runs, notes, self.known = held_runs(self.store, self.experiment)
        return [{**run, "start": start_of(run["config"])} for run in runs], notes

    def logs(self, runs: Sequence[dict[str, Any]], names: Sequence[str]) -> list[Log]:
        """Curves over steps, thinned by the store; ends of experiences are not known to it."""
        from clplat.report.data import Log

        curves = self.store.curves([run["run_id"] for run in runs], names)
        return [Log({name: found for name in names if (found := curves.get((run["run_id"], name)))}) for run in runs]

    def studies(self) -> list[dict[str, Any]]:
        """Those that have ended, read with the runs."""
        return self.known
