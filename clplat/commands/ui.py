"""`clplat ui`: the MLflow server on the local store."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from clplat.commands.arguments import Parser
from clplat.errors import UserError


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
    _check(args)
    from clplat.tracking.server import serve

    return serve(args.output, uri=args.uri, host=args.host, port=args.port, experiment=args.experiment)


def _check(args: argparse.Namespace) -> None:
    """Refuse to serve an empty store in the place of one that was meant."""
    if args.uri is not None:
        scheme, _, path = args.uri.partition(":///")
        if scheme.startswith("sqlite") and not Path(path).is_file():
            raise UserError(f"ui: --uri {args.uri}: there is no such file (valid: a store that runs were tracked in)")
    elif not os.environ.get("MLFLOW_TRACKING_URI") and not Path(args.output).is_dir():
        raise UserError(f"ui: --output {args.output}: there is no such folder (valid: the folder of runs, or --uri)")
