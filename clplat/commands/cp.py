"""`clplat cp`: copy a shipped experiment."""

from __future__ import annotations

import argparse
from pathlib import Path

from clplat.commands.arguments import Parser
from clplat.config.resolve import find_config
from clplat.errors import UserError
from clplat.files import write_atomic


def configure(parser: Parser) -> None:
    parser.add_argument("name", metavar="NAME", help="of a shipped experiment (`clplat list experiments`)")
    parser.add_argument("dest", nargs="?", default=".", metavar="DEST", help="file or folder; here if left out")
    parser.add_argument("--force", action="store_true", help="overwrite what is there")


def main(args: argparse.Namespace) -> int:
    source = find_config(args.name)
    dest = Path(args.dest)
    target = dest / source.name if dest.is_dir() else dest
    if not target.parent.is_dir():
        raise UserError(f"cp: there is no folder {target.parent}")
    if target.exists() and not args.force:
        raise UserError(f"cp: {target} is there already (--force overwrites it)")
    write_atomic(target, source.read_bytes())
    print(target)
    return 0
