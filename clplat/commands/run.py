"""`clplat run`: one run, a resumed one, or several under several seeds with their comparison."""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat import errors
from clplat.commands.arguments import Parser, add_launcher, parse_names, parse_seeds
from clplat.commands.keys import keys_help
from clplat.config.given import keys_of
from clplat.config.reading import read_yaml
from clplat.config.resolve import PARTS, Refused, expand, find_config
from clplat.config.settings import Config
from clplat.errors import DivergedError, Interrupted, UserError

if TYPE_CHECKING:
    from clplat.launchers.choice import Launch
    from clplat.launchers.jobs import Outcome
    from clplat.run.former import Former
    from clplat.run.result import Result

TAKES_KEYS = True


def configure(parser: Parser) -> None:
    parser.usage = (
        "clplat run [CONFIG] [--key value ...] [--only RUN] [--seeds 0..4] [--fresh] | clplat run --resume RUN_DIR"
    )
    parser.add_argument("config", nargs="?", metavar="CONFIG", help="YAML file, shipped experiment, or a run's folder")
    parser.add_argument(
        "--only", nargs="+", metavar="RUN", help="those of `runs:` with these names: er lora, or er,lora"
    )
    parser.add_argument("--seeds", nargs="+", metavar="N", help="run each seed: 0..4, or 0,1,2")
    parser.add_argument("--resume", metavar="RUN_DIR", help="go on from the last good checkpoint of a run")
    parser.add_argument("--fresh", action="store_true", help="of several runs, also those anew that are there already")
    parser.add_argument("--jobs", type=int, metavar="N", help="of several runs, so many at a time (default: 1)")
    add_launcher(parser, "--jobs")
    parser.add_argument("--dry-run", action="store_true", help="resolve everything and run two steps")
    parser.add_argument("-q", "--quiet", action="store_true", help="no progress, only the results")


def help_text(own: list[str], keys: list[str]) -> str:
    """Keys of a configuration; those of parts named on the command line or in CONFIG are shown in full."""
    parts: dict[str, Any] = {}
    config = next((t for t in own if not t.startswith("-")), None)
    if config is not None:
        content = read_yaml(find_config(config))
        named = {k: content[k].get("name") if isinstance(content.get(k), dict) else content.get(k) for k in PARTS}
        parts |= {k: v for k, v in named.items() if isinstance(v, str)}
    tokens = [t for key in keys for t in key.split("=", 1)]
    parts |= {k: tokens[tokens.index(f"--{k}") + 1] for k in PARTS if f"--{k}" in tokens[:-1]}
    return "\n" + keys_help(parts)


def main(args: argparse.Namespace) -> int:
    if args.resume is not None:
        return _resume(args)
    if args.config is None and not args.keys:
        raise UserError("run: name a configuration, or at least --strategy (see `clplat run --help`)")
    seeds = None if args.seeds is None else parse_seeds(args.seeds)
    if seeds is not None and any(k.partition("=")[0] == "--seed" for k in args.keys):
        raise UserError("seeds: give --seed or --seeds, not both")
    try:
        configs = expand(args.keys, args.config, seeds, parse_names(args.only))
    except Refused as refused:
        from clplat.run.trying import all_faults  # which imports torch

        with all_faults():
            raise refused
    launcher = _launcher(args)
    if len(configs) > 1 or launcher is not None:
        return _run_all(configs, args, launcher)
    if args.fresh:
        raise UserError("fresh: a single run always begins anew (several runs: `runs:`, or --seeds)")
    from clplat.api import run_config

    result = run_config(configs[0], dry_run=args.dry_run, quiet=args.quiet)
    if args.dry_run and result.summary:
        print("dry run: two steps taken, nothing left behind")
    else:
        _tell(result)
    return 0


def _resume(args: argparse.Namespace) -> int:
    extra = [args.config] if args.config else []
    extra += [k.partition("=")[0] for k in args.keys if k.startswith("--")]
    extra += [f"--{k}" for k in ("only", "seeds", "fresh", "jobs", "launcher", "resource") if getattr(args, k)]
    if extra:
        raise UserError(
            f"resume: goes on with the run's own configuration and takes nothing else (got {', '.join(extra)})"
        )
    if not (Path(args.resume) / "config.yaml").is_file():
        raise UserError(f"resume: {args.resume} is not a run's folder (it holds no config.yaml)")
    from clplat.api import resume

    _tell(resume(Path(args.resume), quiet=args.quiet))
    return 0


def _tell(result: Result) -> None:
    """Where the run is and what it measured; only one of several processes has a summary to tell."""
    if not result.summary:
        return
    measured = {name: value for name, value in result.metrics.items() if value is not None}
    for name, value in measured.items():
        print(f"{name:<{max(map(len, measured))}}  {value:.4f}")
    print(f"{result.status}: {result.run_dir}" + (f"\n{result.note}" if result.note else ""))


def _launcher(args: argparse.Namespace) -> Launch | None:
    """What does several runs at a time; None where they are done here, in turn."""
    if args.launcher is None and args.jobs is None and not args.resource:
        return None
    from clplat.launchers.choice import chosen

    if args.dry_run:
        raise UserError("launcher: a dry run is done here (leave out --launcher, --jobs and --resource)")
    return chosen(args.launcher or "local", 1 if args.jobs is None else args.jobs, args.resource)


def _run_all(configs: list[Config], args: argparse.Namespace, launcher: Launch | None) -> int:
    """All runs, in turn in this process or by a launcher; then the comparison, printed and as a report.

    A diverged run stops none. Runs of the same configuration and code that are there already are used, or gone on
    with, unless `--fresh`.
    """
    there = [None] * len(configs) if args.fresh or args.dry_run else _there(configs)
    complete = [n for n, known in enumerate(there) if known is not None and known.status == "complete"]
    finished: dict[int, Path] = {n: known.run_dir for n in complete if (known := there[n]) is not None}
    for number, folder in finished.items():
        _say(f"[{number + 1}/{len(configs)}] {_who(configs[number])}: complete in {folder}")
    left = [n for n in range(len(configs)) if n not in finished]
    failures = 0
    for number, outcome in (
        _in_turn(configs, left, there, args) if launcher is None else _launched(configs, left, launcher, args)
    ):
        if "run_dir" in outcome:
            finished[number] = Path(outcome["run_dir"])
            continue
        failures += 1
        for fault in outcome["faults"]:
            _say(f"clplat: {_who(configs[number])}: {fault}")
    if finished and not args.dry_run:
        _compare([finished[n] for n in sorted(finished)], configs)
    return 1 if failures else 0


def _in_turn(
    configs: list[Config], left: list[int], there: Sequence[Former | None], args: argparse.Namespace
) -> Iterator[tuple[int, Outcome]]:
    from clplat.api import resume, run_config

    started = time.monotonic()
    quiet = args.quiet or not sys.stderr.isatty()  # off a terminal one line a run is enough
    for done, number in enumerate(left):
        config, known = configs[number], there[number]
        note = f" (about {(time.monotonic() - started) / done * (len(left) - done):.0f} s left)" if done else ""
        going = "" if known is None else f": going on in {known.run_dir}"
        _say(f"[{number + 1}/{len(configs)}] {_who(config)}{going}{note}")
        try:
            result = (
                resume(known.run_dir, quiet=quiet) if known else run_config(config, dry_run=args.dry_run, quiet=quiet)
            )
        except DivergedError as error:
            yield number, {"faults": error.faults}
        except Interrupted as error:
            ended = f"run {number + 1} of {len(configs)}: the same command goes on here"
            raise Interrupted(*error.faults, ended) from None
        else:
            yield number, {"run_dir": result.run_dir}


def _launched(
    configs: list[Config], left: list[int], launcher: Launch, args: argparse.Namespace
) -> Iterator[tuple[int, Outcome]]:
    """As `_in_turn`, by a launcher; checked here, before anything is given out."""
    from clplat.commands.jobs import RunJob
    from clplat.launchers.jobs import stopping

    if given := sorted({key for n in left for key in keys_of(configs[n])}):
        raise UserError(f"launcher: {', '.join(given)} was given in Python, and other processes can't have it")
    since = time.strftime("%Y%m%d-%H%M%S") if args.fresh else ""
    started, total, done = time.monotonic(), len(configs), 0
    if not left:
        return
    _say(f"clplat: {len(left)} of {total} runs are given out")
    jobs = [RunJob(configs[n], Path.cwd(), since) for n in left]
    try:
        with stopping("run"), contextlib.closing(launcher(jobs)) as outcomes:
            for place, outcome in outcomes:
                number, done = left[place], done + 1
                who, error = _who(configs[number]), outcome.get("error")
                if error not in (None, "DivergedError", "ClplatError"):  # of what all runs have in common
                    raise getattr(errors, error)(*(f"{who}: {fault}" for fault in outcome["faults"]))
                rest = (time.monotonic() - started) / done * (len(left) - done)
                note = f" (about {rest:.0f} s left)" if done < len(left) else ""
                _say(f"[{number + 1}/{total}] {who}: {outcome.get('run_dir', 'failed')}{note}")
                yield number, outcome
    except (Interrupted, KeyboardInterrupt):
        ended = f"run: stopped with {total - len(left) + done} of {total} runs complete"
        raise Interrupted(f"{ended}: the same command goes on here") from None


def _who(config: Config) -> str:
    return f"{config.name}, seed {config.seed}"


def _there(configs: list[Config]) -> list[Former | None]:
    """For each run what of it is there already and can be used; says how many, and why others can't."""
    from clplat.run.former import former

    found = [former(config) for config in configs]
    for config, one in zip(configs, found, strict=True):
        if one is not None and one.status == "unusable":
            _say(f"clplat: {config.name}, seed {config.seed}: run anew beside {one.run_dir}: {one.reason}")
    used = [None if one is None or one.status == "unusable" else one for one in found]
    complete = sum(one is not None and one.status == "complete" for one in used)
    if partial := sum(map(bool, used)) - complete:
        _say(f"clplat: {partial} of {len(configs)} runs are gone on with (--fresh begins anew)")
    if complete:
        _say(f"clplat: {complete} of {len(configs)} runs are complete already and used again (--fresh runs all anew)")
    return used


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _compare(run_dirs: list[Path], configs: list[Config]) -> None:
    from rich.console import Console

    from clplat.report import write_report
    from clplat.report.compare import load_summaries
    from clplat.report.tables import console_comparison

    console = Console()
    console.width = max(console.width, 100)  # narrower, and the names of strategies are cut
    console.print(console_comparison(load_summaries(run_dirs)))
    folder = Path(configs[0].output) / str(configs[0].name).partition("/")[0] / "comparison"
    print(f"report: {write_report(run_dirs, folder)}")
