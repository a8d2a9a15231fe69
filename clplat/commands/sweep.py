"""`clplat sweep`: an Optuna study; any number of workers may join it."""

from __future__ import annotations

import argparse

from clplat.commands.arguments import Parser, add_launcher

TAKES_KEYS = True


def configure(parser: Parser) -> None:
    parser.usage = "clplat sweep [CONFIG] [--trials N] [--workers N] [--launcher NAME] [--join] [--key value ...]"
    text = "YAML file with a `sweep:` section, or shipped experiment; none: --strategy NAME says what is searched"
    parser.add_argument("config", metavar="CONFIG", nargs="?", help=text)
    parser.add_argument("--trials", type=int, metavar="N", help="in the whole study (default: sweep.trials)")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="so many at a time (default: 1)")
    add_launcher(parser, "--workers")
    parser.add_argument("--join", action="store_true", help="the study must exist already")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, only the results")


def main(args: argparse.Namespace) -> int:
    from clplat.sweep.study import sweep

    result = sweep(
        args.config, args.keys, trials=args.trials, workers=args.workers, join=args.join, quiet=args.quiet,
        launcher=args.launcher or "local", resources=args.resource,
    )  # fmt: skip
    if args.quiet:
        print(result.best_config)
    return 0
