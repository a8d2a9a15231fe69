"""`clplat report`: compare runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from clplat.commands.arguments import Parser
from clplat.config.discovery import did_you_mean
from clplat.errors import UserError
from clplat.run.rundir import runs_in


def configure(parser: Parser) -> None:
    parser.add_argument(
        "run_dirs", nargs="*", metavar="RUN_DIR", help="folders of runs, or of a study or experiment: all runs in it"
    )
    parser.add_argument("--experiment", metavar="NAME", help="all runs of this name under --output")
    parser.add_argument("--output", default="runs", metavar="DIR", help="folder of the runs (default: runs)")
    parser.add_argument("--oracle", metavar="RUN_DIR", help="write RUN_DIR's erasure report, compared with this run")
    parser.add_argument("--dest", default="report", metavar="DIR", help="where the report goes (default: report/)")


def main(args: argparse.Namespace) -> int:
    run_dirs = runs_in(args.run_dirs)
    if args.experiment is not None:
        run_dirs += runs_of(args.experiment, Path(args.output))
    if not run_dirs:
        raise UserError("report: name folders of runs, or --experiment NAME")
    if args.oracle is not None:
        return _erasure(run_dirs, Path(args.oracle))
    from clplat.report import report_command

    page, text = report_command(run_dirs, Path(args.dest))
    print(f"{text}\nreport: {page}")
    return 0


def _erasure(run_dirs: list[Path], oracle: Path) -> int:
    """Write the erasure report of one run into its folder, with the oracle's numbers."""
    if len(run_dirs) != 1:
        raise UserError(f"report: --oracle compares one run with another ({len(run_dirs)} are given)")
    if not (oracle / "summary.json").is_file():
        raise UserError(f"oracle: {oracle} is not the folder of a run (it holds no summary.json)")
    from clplat.report.erasure import write_erasure

    page = write_erasure(run_dirs[0], oracle)
    if page is None:
        raise UserError(f"report: {run_dirs[0]} has answered no request to forget")
    print(f"report: {page}")
    return 0


def runs_of(name: str, output: Path) -> list[Path]:
    """Folders of the runs called `name`, or `name/...`, under `output`, oldest first.

    Raises:
        UserError: there are none, with the nearest names.
    """
    found = sorted(f.parent for f in (output / name).rglob("summary.json"))
    if found:
        return found
    names = {f.parent.parent.relative_to(output).as_posix() for f in output.rglob("summary.json")}
    names |= {n.partition("/")[0] for n in names}
    near = did_you_mean(name, names) or (f" (there are: {', '.join(sorted(names))})" if names else "")
    raise UserError(f"experiment: no runs of '{name}' under {output}{near}")
