"""`clplat ui`: the MLflow server on the local store."""

from __future__ import annotations

import argparse

from clplat.commands.arguments import Parser


def configure(parser: Parser) -> None:
    parser.add_argument("--output", default="runs", metavar="DIR", help="folder of the runs (default: runs)")
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument(
        "--uri", help="another store than $MLFLOW_TRACKING_URI or the one beside the runs; http... of a running server"
    )
    parser.add_argument("--experiment", help="that the link opens (default: $MLFLOW_EXPERIMENT_NAME, or clplat)")
    parser.add_argument("--port", type=int, default=5000, help="(default: 5000)")


def main(args: argparse.Namespace) -> int:
    from clplat.tracking.server import serve

    return serve(args.output, uri=args.uri, host=args.host, port=args.port, experiment=args.experiment)
