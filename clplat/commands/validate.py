"""`clplat validate`: all faults of a configuration at once, without running it."""

from __future__ import annotations

import argparse

from clplat.commands.arguments import Parser
from clplat.config.reading import read_yaml
from clplat.config.resolve import expand, find_config
from clplat.errors import MissingError, UserError

TAKES_KEYS = True


def configure(parser: Parser) -> None:
    parser.usage = "clplat validate CONFIG [--key value ...]"
    parser.add_argument("config", metavar="CONFIG", help="YAML file or shipped experiment")


def main(args: argparse.Namespace) -> int:
    if "sweep" in read_yaml(find_config(args.config)):
        return _sweep(args)
    from clplat.run.build import build
    from clplat.run.launch import faults as faults_of_the_end
    from clplat.run.trying import all_faults

    with all_faults():
        configs = expand(args.keys, args.config)

    faults, missing = dict[str, None](), dict[str, None]()
    for config in configs:
        try:
            stream, _ = build(config)
            faults |= dict.fromkeys(faults_of_the_end(config, stream))
        except UserError as error:
            faults |= dict.fromkeys(error.faults)
        except MissingError as error:
            missing |= dict.fromkeys(error.faults)
    if faults:
        raise UserError(*faults, *missing)
    if missing:
        raise MissingError(*missing)
    print(f"{args.config}: no faults ({len(configs)} run{'s' if len(configs) > 1 else ''})")
    return 0


def _sweep(args: argparse.Namespace) -> int:
    """The section itself, then the trials that it leads to."""
    from clplat.sweep.check import check
    from clplat.sweep.plan import read_plan

    plan = read_plan(args.config, args.keys, None)
    check(plan, plan.keys)
    what = f"{plan.trials} trials, {len(plan.seeds)} seed(s) each, {' and '.join(plan.metrics)}"
    print(f"{args.config}: no faults (a sweep: {what})")
    return 0
