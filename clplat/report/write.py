"""Reports: one self-contained HTML page for one run or many, with its figures and tables as files beside it."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clplat.errors import UserError
from clplat.files import write_atomic
from clplat.report.compare import Group, load_summaries, split_streams

if TYPE_CHECKING:
    from clplat.metrics.record import RunRecord
    from clplat.report.spec import Figure


def write_report(run_dirs: Sequence[Path | str], out_dir: Path | str, *, plots: bool = False) -> Path:
    """Write report.html, tables/ (CSV, LaTeX, Markdown) and figures/ (SVG) into `out_dir` and return the page's path.

    Args:
        run_dirs: run directories, of any status; one or many. Different streams get sections of their own.
        out_dir: made if absent; a run's own directory will do.
        plots: also draw figures/*.png and *.pdf with matplotlib; takes seconds, where all the rest takes a fraction of
            one.

    Raises:
        UserError: no run directory given, or one that is none or cannot be read.
    """
    if not run_dirs:
        raise UserError("RUN_DIR: none given (valid: one run directory or more)")
    return _write(split_streams(load_summaries(run_dirs)), Path(out_dir), plots)


def report_command(run_dirs: Sequence[Path | str], out: Path | str) -> tuple[Path, str]:
    """What `clplat report` does: write the report and return its path and the comparison as plain text."""
    from clplat.report.tables import console_comparison, plain

    page = write_report(run_dirs, out, plots=True)
    return page, plain(console_comparison(load_summaries(run_dirs)))


def report_run(run_dir: Path, record: RunRecord, oracle: str | None) -> list[Path]:
    """Write the reports of a run that has ended into its folder; what was written.

    An oracle that does not fit is said on stderr and left out, since the run is done.
    """
    written = [write_report([run_dir], run_dir), run_dir / "figures"]
    if not any(e.kind == "forget" for e in record.experiences):
        return written
    from clplat.report.erasure import write_erasure

    try:
        page = write_erasure(run_dir, oracle)
    except UserError as error:
        print(f"clplat: {error}: the erasure report is written without it", file=sys.stderr, flush=True)
        page = write_erasure(run_dir)
    return written if page is None else [*written, page, page.with_suffix(".json")]


def _write(streams: list[list[Group]], out: Path, plots: bool) -> Path:
    from clplat.report import ranked, tables
    from clplat.report.data import read_log
    from clplat.report.figures import build_figures
    from clplat.report.page import build_page
    from clplat.report.ranks import rankings

    drawn = [build_figures(groups, {g: [read_log(run) for run in g.counted] for g in groups}) for groups in streams]
    (out / "tables").mkdir(parents=True, exist_ok=True)
    files = {"metrics.csv": tables.metrics_csv(streams), "runs.csv": tables.runs_csv(streams),
             "comparisons.csv": tables.comparisons_csv(streams)}  # fmt: skip
    found = rankings(streams)
    files |= ranked.files(found)
    over = [figure for i, ranking in enumerate(found) if (figure := ranked.diagram(ranking, i)) is not None]
    for slug, groups in zip(_slugs(streams), streams, strict=True):
        files |= {f"{slug}.tex": tables.latex(groups), f"{slug}.md": tables.markdown(groups)}
    for name, content in files.items():
        write_atomic(out / "tables" / name, content)
    _write_figures([over, *drawn], ["", *(f"{s}-" if len(streams) > 1 else "" for s in _slugs(streams))],
                   out / "figures", plots)  # fmt: skip
    page = out / "report.html"
    write_atomic(page, build_page(streams, drawn, over, ranked.sections(found)))
    return page


def _write_figures(drawn: list[list[Figure]], prefixes: list[str], folder: Path, plots: bool) -> None:
    from clplat.report.standalone import standalone

    folder.mkdir(exist_ok=True)
    for prefix, figures in zip(prefixes, drawn, strict=True):
        for figure in figures:
            write_atomic(folder / f"{prefix}{figure.slug}.svg", standalone(figure))
            if plots:
                from clplat.report.plots import draw

                for ending, content in draw(figure).items():
                    write_atomic(folder / f"{prefix}{figure.slug}.{ending}", content)


def _slugs(streams: list[list[Group]]) -> list[str]:
    """File names of streams: safe characters, no two the same."""
    found: list[str] = []
    for groups in streams:
        name = re.sub(r"[^a-z0-9]+", "-", groups[0].stream.lower()).strip("-")[:60] or "stream"
        found.append(
            next(n for i in range(1, len(streams) + 1) if (n := name if i == 1 else f"{name}-{i}") not in found)
        )
    return found
