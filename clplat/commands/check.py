"""`clplat check`: the conformance suite on one strategy."""

from __future__ import annotations

import argparse

from clplat.commands.arguments import Parser
from clplat.config import discovery


def configure(parser: Parser) -> None:
    parser.add_argument("strategy", metavar="PATH_OR_NAME", help="a strategy's name, or path/to/file.py:Class")


def main(args: argparse.Namespace) -> int:
    discovery.find("strategies", args.strategy)  # an unknown name is refused before anything heavy is imported
    from clplat.testing import check

    return check(args.strategy)
