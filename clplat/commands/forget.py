"""`clplat forget`: ask the learner of a finished run to erase something, or remove what is left of what it erased."""

from __future__ import annotations

import argparse
from pathlib import Path

from clplat.commands.arguments import Parser
from clplat.errors import UserError


def configure(parser: Parser) -> None:
    parser.usage = "clplat forget RUN_DIR [ID ...] [--purge]"
    parser.add_argument("run_dir", metavar="RUN_DIR", help="folder of a finished run, whose data must be at hand")
    parser.add_argument("ids", nargs="*", metavar="ID", help="class:7, sample:1234, experience:NAME or user:5")
    parser.add_argument(
        "--purge", action="store_true", help="remove scores of single erased samples and checkpoints before the last"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, only the result")


def main(args: argparse.Namespace) -> int:
    if not args.ids and not args.purge:
        raise UserError("forget: name what to erase (class:7, sample:1234, experience:NAME, user:5), or --purge")
    from clplat.api import forget

    forget(args.run_dir, args.ids, purge=args.purge, quiet=args.quiet)
    page = Path(args.run_dir) / "erasure.html"
    print(f"report: {page}" if page.is_file() else f"purged: {args.run_dir}")
    return 0
