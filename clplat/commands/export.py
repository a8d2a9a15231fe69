"""`clplat export`: a run's network in the formats of others."""

from __future__ import annotations

import argparse

from clplat.commands.arguments import Parser


def configure(parser: Parser) -> None:
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a run")
    parser.add_argument(
        "--to", default="safetensors", metavar="FORMAT", help="safetensors (the default), hf, peft, or onnx"
    )
    parser.add_argument("--dest", metavar="DIR", help="a new folder (default: RUN_DIR/export/FORMAT)")


def main(args: argparse.Namespace) -> int:
    from clplat.api import export

    print(f"exported: {export(args.run_dir, to=args.to, dest=args.dest)}")
    return 0
