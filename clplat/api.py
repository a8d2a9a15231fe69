"""The Python API: run, resume and load. The command line is a thin layer over it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clplat.config.settings import Config, StartSettings
from clplat.errors import UserError
from clplat.run import checkpoint
from clplat.run.result import Result
from clplat.run.seal import break_seal, close_seal, seal_faults

if TYPE_CHECKING:
    from clplat.run.learner import Learner


def run(
    config: str | Path | dict[str, Any] | None = None, *, dry_run: bool = False, quiet: bool = False, **overrides: Any
) -> Result:
    """One run.

    Args:
        config: YAML file, name of a shipped experiment, or a dict in the layout of config.yaml.
        dry_run: resolve everything and take two steps, leaving nothing behind.
        quiet: no progress on the screen.
        overrides: as in YAML: `strategy="er"`, `seed=3`, `loop={"max_epochs": 2}`, `**{"strategy.lr": 0.1}`.

    Raises:
        UserError, MissingError: see their messages.
        Interrupted: after Ctrl-C; the run can be resumed.
        DivergedError: the loss is no longer finite.
    """
    from clplat.config.resolve import resolve

    return run_config(resolve(config=config, **overrides), dry_run=dry_run, quiet=quiet)


def run_config(
    config: Config, *, dry_run: bool = False, quiet: bool = False, run_dir: Path | None = None, report: bool = True
) -> Result:
    """One run of a resolved configuration; `run_dir` overrides where it goes. Raises as `run` does."""
    from clplat.report.write import report_run
    from clplat.run.launch import launch

    if dry_run:
        return _dry_run(config)
    return launch(config, run_dir, quiet=quiet, report=report_run if report else None)


def resume(run_dir: str | Path, *, quiet: bool = False) -> Result:
    """Go on with a run from its last good checkpoint, mid-experience included. Raises as `run` does."""
    from clplat.config.resolve import resolve
    from clplat.report.write import report_run
    from clplat.run.launch import launch

    run_dir = Path(run_dir)
    path = run_dir / "config.yaml"
    if not path.is_file():
        raise UserError(f"resume: {run_dir} is no run directory (config.yaml is missing in it)")
    return launch(resolve(config=path), run_dir, quiet=quiet, resumed=True, report=report_run)


def forget(
    run_dir: str | Path, request: str | Sequence[str] = (), *, purge: bool = False, quiet: bool = True
) -> Learner:
    """Ask the learner of a finished run to erase something more; gives the learner after it, as `load` does.

    The request becomes a forget experience at the end of the run: evaluated, in ledger and summary, and in a new
    checkpoint. Interrupted, it is gone on with by `resume`.

    Args:
        run_dir: of the run, whose data must be at hand.
        request: ids of one kind: "class:7", "sample:1234", "experience:split_0", "user:5"; one, or several; none where
            only `purge` is asked for.
        purge: also remove what else derives from erased samples: scores of single ones in `audit/`, and checkpoints
            before the last. The erasure report is written anew.
        quiet: no progress on the screen.

    Raises:
        UserError: the run is not finished, its strategy can't erase, or the ledger refuses the request (unknown, never
            learned, erased already, named twice, empty): nothing is changed.
        Interrupted, MissingError: as `run` does.
    """
    from clplat.erasure import late

    run_dir, ids = Path(run_dir), [request] if isinstance(request, str) else list(request)
    if ids or not purge:
        former = _note_request(run_dir, ids)
        try:
            resume(run_dir, quiet=quiet)
        except UserError:
            late.withdraw(run_dir, former)
            close_seal(run_dir)
            raise
    learner = load(run_dir)
    if purge:
        _purge(run_dir)
    return learner


def _purge(run_dir: Path) -> None:
    """Remove what derives from erased samples beside the learner itself, and write the report of what is left."""
    import shutil

    from clplat.config.resolve import resolve
    from clplat.erasure.audit.aggregates import let_go
    from clplat.erasure.audit.audit import FOLDER
    from clplat.report.erasure import write_erasure

    if faults := seal_faults(run_dir):
        raise UserError(*faults)
    with checkpoint.lock(run_dir):
        break_seal(run_dir)
        for folder in sorted((run_dir / FOLDER).glob("*")):
            let_go(folder)
        for old in sorted(p for p in (run_dir / "checkpoints").glob("[0-9]*") if p.is_dir())[:-1]:
            shutil.rmtree(old)
        checkpoint.clean(run_dir)
        write_erasure(run_dir, resolve(config=run_dir / "config.yaml").audit.oracle)
        close_seal(run_dir)


def _note_request(run_dir: Path, ids: list[str]) -> int:
    """Note a request in the folder of a finished run, having checked it. Returns how many there were before."""
    from clplat.config import discovery
    from clplat.config.resolve import resolve
    from clplat.erasure import late
    from clplat.run.build import build_stream
    from clplat.strategy import check_kinds
    from clplat.stream import Kind

    if faults := seal_faults(run_dir):
        raise UserError(*faults)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"forget: {run_dir} is no run directory (config.yaml is missing in it)")
    config = resolve(config=run_dir / "config.yaml")
    if faults := check_kinds(discovery.load("strategies", config.strategy.name), [Kind.FORGET]):
        raise UserError(*faults)
    with checkpoint.lock(run_dir):
        state, notes = checkpoint.load_newest(run_dir / "checkpoints")
        stream = build_stream(config)
        late.extend(stream, run_dir)
        if state is None or _experiences_done(state) < len(stream):
            way = f"go on with it first (clplat run --resume {run_dir})"
            raise UserError(f"forget: {run_dir} is not finished: {way}", *notes)
        former = late.note(run_dir, stream, ids)
    break_seal(run_dir)
    return former


def _experiences_done(state: dict[str, Any]) -> int:
    try:
        return int(state["progress"]["experience"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"the checkpoint holds no state of a run ({type(error).__name__}: {error})") from error


def load(run_dir: str | Path) -> Learner:
    """The learner of a run as its last checkpoint has it, on the CPU, in evaluation mode; needs no data.

    `learner(inputs)` takes raw inputs and gives `Predictions`; `learner.classes` names what it predicts.

    Raises:
        UserError: not a run directory, its last checkpoint is damaged, or its configuration was changed.
    """
    from clplat.config.resolve import resolve
    from clplat.run.learner import rebuilt
    from clplat.run.summary import changes

    run_dir = Path(run_dir)
    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"load: {run_dir} is no run directory (config.yaml is missing in it)")
    state, notes = checkpoint.load_newest(run_dir / "checkpoints")
    if state is None or notes:  # an earlier checkpoint holds an earlier learner
        way = f" (clplat run --resume {run_dir} makes the last one anew)" if state is not None else ""
        raise UserError(*notes, f"load: {run_dir} does not hold its last checkpoint whole{way}")
    config = resolve(config=run_dir / "config.yaml")
    if changed := changes(state.get("config"), config):
        raise UserError(f"load: {run_dir / 'config.yaml'} was changed since the run began: {changed}; put it back")
    try:
        return rebuilt(config, state)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"load: the checkpoint does not fit this run ({type(error).__name__}: {text})") from error


def export(run_dir: str | Path, *, to: str = "safetensors", dest: str | Path | None = None) -> Path:
    """The network of a run in another format, and beside it learner.json: its preprocessing and classes.

    Args:
        run_dir: of the run; needs no data.
        to: "safetensors", or "hf" for language models and CLIP: the folder that transformers reads.
        dest: a new or empty folder; None is `export/<to>` in the run's.

    Raises:
        UserError: as `load` does; a format that there is not for this network; a strategy that predicts by more than
            its network.
    """
    from clplat.config.resolve import resolve
    from clplat.run.export import export as write

    run_dir = Path(run_dir)
    learner = load(run_dir)
    folder = run_dir / "export" / to if dest is None else Path(dest)
    return write(learner, resolve(config=run_dir / "config.yaml"), to, folder)


def _dry_run(config: Config) -> Result:
    import tempfile

    from clplat.run.launch import launch
    from clplat.run.start import start_run

    kept = start_run(config, None)  # a run to start from is not made for two steps
    config = replace(config, start=replace(config.start, run=str(kept)) if kept else StartSettings())
    loop = replace(config.loop, max_steps=2, stop_after=1, eval_every=None, checkpoint_every=None)
    config = replace(config, loop=loop, tracking=replace(config.tracking, enabled=False))
    with tempfile.TemporaryDirectory(prefix="clplat-dry-run-") as folder:
        return launch(config, Path(folder), quiet=True)
