"""The Python API: run, resume and load. The command line is a thin layer over it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from clplat.config.given import is_given, keys_of
from clplat.config.settings import Config, Part, flat
from clplat.errors import Interrupted, UserError
from clplat.files import to_json, write_atomic
from clplat.run import checkpoint
from clplat.run.result import Result, Results
from clplat.run.rundir import newest, runs_in
from clplat.run.seal import break_seal, close_seal, seal_faults

if TYPE_CHECKING:
    from clplat.report.compared import Compared
    from clplat.run.learner import Learner


@overload
def run(
    config: str | Path | dict[str, Any] | None = None, *, seeds: None = None, resume: bool = False,
    dry_run: bool = False, quiet: bool = False, **overrides: Any,
) -> Result:  # fmt: skip
    """One run."""


@overload
def run(
    config: str | Path | dict[str, Any] | None = None, *, seeds: Sequence[int], resume: bool = False,
    dry_run: bool = False, quiet: bool = False, **overrides: Any,
) -> Results:  # fmt: skip
    """Several runs."""


def run(
    config: str | Path | dict[str, Any] | None = None, *, seeds: Sequence[int] | None = None, resume: bool = False,
    dry_run: bool = False, quiet: bool = False, **overrides: Any,
) -> Result | Results:  # fmt: skip
    """One run, or with `seeds` each run of the configuration under each seed, one after the other.

    Stream, strategy and backbone may be objects: see docs/api.md.

    Args:
        config: YAML file, name of a shipped experiment, or a dict in the layout of config.yaml.
        seeds: each ≥ 0.
        resume: go on with the newest run of the same name and seed under `output`, which must be of the same
            configuration and objects; one that is complete is not run again, and one that was never begun is begun.
        dry_run: resolve everything and take two steps, leaving nothing behind.
        quiet: no progress on the screen.
        overrides: as in YAML: `strategy="er"`, `seed=3`, `loop={"max_epochs": 2}`, `**{"strategy.lr": 0.1}`.

    Raises:
        UserError, MissingError: see their messages.
        Interrupted: after Ctrl-C; the run can be resumed.
        DivergedError: the loss is no longer finite.
    """
    from clplat.config.resolve import expand, resolve
    from clplat.run.trying import all_faults

    if seeds is None:
        with all_faults():
            resolved = resolve(config=config, **overrides)
        return _run(resolved, resume=resume, dry_run=dry_run, quiet=quiet)
    if not (wrong := [s for s in seeds if isinstance(s, bool) or not isinstance(s, int) or s < 0]) and len(seeds):
        with all_faults():
            configs = expand(config=config, seeds=seeds, **overrides)
        return Results(_run(c, resume=resume, dry_run=dry_run, quiet=quiet) for c in configs)
    raise UserError(f"seeds: {wrong[0] if wrong else seeds!r} is out of range (valid: a list of integers ≥ 0)")


def _run(config: Config, *, resume: bool, dry_run: bool, quiet: bool) -> Result:
    folder = newest(config) if resume and not dry_run else None
    if folder is None:
        return run_config(config, dry_run=dry_run, quiet=quiet)
    _check_same(folder, config, "resume")
    return _finished(folder) or _go_on(folder, config, quiet=quiet)


def _finished(run_dir: Path) -> Result | None:
    """What a complete run has left; None where it is not complete."""
    try:
        summary = json.loads((run_dir / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return Result(run_dir, summary) if summary.get("status") == "complete" else None


def _check_same(run_dir: Path, config: Config, command: str) -> None:
    """Refuse a configuration, or objects, that are not those a run was begun with; names the first that differs."""
    from clplat.config.reading import read_yaml
    from clplat.run.summary import changes

    before, now = read_yaml(run_dir / "config.yaml"), keys_of(config)
    for key, name in flat(before).items():
        key = key.removesuffix(".name")
        if is_given(name) and now.get(key, name) != name:
            raise UserError(f"{command}: {key}: {run_dir} was begun with {name}, and this is another, {now[key]}")
    if changed := changes(before, config):
        raise UserError(f"{command}: {run_dir} was begun with another configuration: {changed}")


def run_config(
    config: Config, *, dry_run: bool = False, quiet: bool = False, run_dir: Path | None = None, report: bool = True
) -> Result:
    """One run of a resolved configuration; `run_dir` overrides where it goes. Raises as `run` does."""
    from clplat.report import report_run
    from clplat.run.launch import launch

    if dry_run:
        return _dry_run(config)
    return launch(config, run_dir, quiet=quiet, report=report_run if report else None)


def resume(run_dir: str | Path, *, quiet: bool = False, **objects: Any) -> Result:
    """Go on with a run from its last good checkpoint, mid-experience included. Raises as `run` does.

    Args:
        objects: stream, strategy and backbone as they were given to `run`, where these were objects; they are told by
            their content to be the same.
    """
    run_dir = Path(run_dir)
    return _go_on(run_dir, _config_of(run_dir, "resume", objects), quiet=quiet)


def _go_on(run_dir: Path, config: Config, *, quiet: bool) -> Result:
    from clplat.report import report_run
    from clplat.run.launch import launch

    return launch(config, run_dir, quiet=quiet, resumed=True, report=report_run)


def _config_of(run_dir: Path, command: str, objects: dict[str, Any], *, data: bool = True) -> Config:
    """The configuration of a run, with the objects that were given to it in Python.

    Args:
        data: the stream is needed; else the objects in it may be left out.
    """
    from clplat.config.reading import read_yaml
    from clplat.config.resolve import resolve

    if not (run_dir / "config.yaml").is_file():
        raise UserError(f"{command}: {run_dir} is no run directory (config.yaml is missing in it)")
    if other := sorted(objects.keys() - {"stream", "strategy", "backbone"}):
        raise UserError(f"{command}: takes objects for stream, strategy and backbone alone (got {', '.join(other)})")
    layer, aside = read_yaml(run_dir / "config.yaml"), None
    if not data and "stream" not in objects and any(map(is_given, flat({"stream": layer.get("stream")}).values())):
        aside = layer.pop("stream")
    config = resolve(config=layer, **objects)
    if aside is not None:
        config = replace(config, stream=Part(aside.pop("name"), aside))
    if objects:
        _check_same(run_dir, config, command)
    return config


def forget(
    run_dir: str | Path, request: str | Sequence[str] = (), *, purge: bool = False, quiet: bool = True, **objects: Any
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
        objects: stream, strategy and backbone, as `resume` takes them.

    Raises:
        UserError: the run is not finished, its strategy can't erase, or the ledger refuses the request (unknown, never
            learned, erased already, named twice, empty): nothing is changed.
        Interrupted, MissingError: as `run` does.
    """
    from clplat.erasure import late

    run_dir, ids = Path(run_dir), [request] if isinstance(request, str) else list(request)
    if ids or not purge:
        former = _note_request(run_dir, ids, objects)
        try:
            resume(run_dir, quiet=quiet, **objects)
        except UserError:
            late.withdraw(run_dir, former)
            close_seal(run_dir)
            raise
    learner = load(run_dir, **objects)
    if purge:
        _purge(run_dir, objects)
    return learner


def _purge(run_dir: Path, objects: dict[str, Any]) -> None:
    """Remove what derives from erased samples beside the learner itself, and write the report of what is left."""
    from clplat.erasure.audit.aggregates import let_go
    from clplat.erasure.audit.audit import FOLDER
    from clplat.report.erasure import write_erasure
    from clplat.run import filing

    if faults := seal_faults(run_dir):
        raise UserError(*faults)
    with checkpoint.lock(run_dir):
        break_seal(run_dir)
        for folder in sorted((run_dir / FOLDER).glob("*")):
            let_go(folder)
        filing.purge(run_dir)
        checkpoint.clean(run_dir)
        write_erasure(run_dir, _config_of(run_dir, "forget", objects).audit.oracle)
        close_seal(run_dir)


def _note_request(run_dir: Path, ids: list[str], objects: dict[str, Any]) -> int:
    """Note a request in the folder of a finished run, having checked it. Returns how many there were before."""
    from clplat.erasure import late
    from clplat.run.build import build_stream
    from clplat.run.given import maker
    from clplat.strategy import check_kinds
    from clplat.stream import Kind

    if faults := seal_faults(run_dir):
        raise UserError(*faults)
    config = _config_of(run_dir, "forget", objects)
    if faults := check_kinds(maker(config, "strategy"), [Kind.FORGET]):
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


def load(run_dir: str | Path, **objects: Any) -> Learner:
    """The learner of a run as its last checkpoint has it, on the CPU, in evaluation mode; needs no data.

    `learner(inputs)` takes raw inputs and gives `Predictions`; `learner.classes` names what it predicts.

    Args:
        objects: strategy and backbone as they were given to `run`, where these were objects.

    Raises:
        UserError: not a run directory, its last checkpoint is damaged, or its configuration was changed.
    """
    from clplat.run.learner import rebuilt
    from clplat.run.summary import changes

    run_dir = Path(run_dir)
    config = _config_of(run_dir, "load", objects, data=False)
    state, notes = checkpoint.load_newest(run_dir / "checkpoints")
    if state is None or notes:  # an earlier checkpoint holds an earlier learner
        way = f" (clplat run --resume {run_dir} makes the last one anew)" if state is not None else ""
        raise UserError(*notes, f"load: {run_dir} does not hold its last checkpoint whole{way}")
    if changed := changes(state.get("config"), config):
        raise UserError(f"load: {run_dir / 'config.yaml'} was changed since the run began: {changed}; put it back")
    try:
        return rebuilt(config, state, run_dir)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        text = " ".join(str(error).split())[:200]
        raise UserError(f"load: the checkpoint does not fit this run ({type(error).__name__}: {text})") from error


def report(*runs: str | Path | Result, dest: str | Path = "report") -> Path:
    """Compare runs: the page, which is given back, and beside it figures and tables, as `clplat report` makes them.

    Args:
        runs: results, or folders of runs, or of experiments and studies, whose runs are all taken.
        dest: the folder that they go to.

    Raises:
        UserError: no runs, or a folder without any.
    """
    from clplat.report import write_report

    folders = runs_in(run.run_dir if isinstance(run, Result) else run for run in runs)
    if not folders:
        raise UserError("report: name runs (valid: results, or folders of runs)")
    return write_report(folders, dest, plots=True)


def compare(runs: Iterable[str | Path | Result]) -> Compared:
    """Runs side by side: `frame()`, `tests()`, and a table in a notebook.

    Args:
        runs: results, or folders of runs, or of experiments and studies, whose runs are all taken.

    Raises:
        UserError: no runs, or a folder without any.
    """
    from clplat.report.compare import load_summaries, split_streams
    from clplat.report.compared import Compared

    folders = runs_in(run.run_dir if isinstance(run, Result) else run for run in runs)
    if not folders:
        raise UserError("compare: name runs (valid: results, or folders of runs)")
    return Compared(split_streams(load_summaries(folders)))


def export(run_dir: str | Path, *, to: str = "safetensors", dest: str | Path | None = None, **objects: Any) -> Path:
    """The network of a run in another format, and beside it learner.json: its preprocessing and classes.

    Args:
        run_dir: of the run; needs no data.
        to: "safetensors"; "hf" for language models and CLIP: the folder that transformers reads; "peft": low-rank
            adapters beside a pretrained model; "onnx": one graph, from what the stream holds to logits.
        dest: a new or empty folder; None is `export/<to>` in the run's.
        objects: strategy and backbone, as `load` takes them.

    Raises:
        UserError: as `load` does; a format that there is not for this network; a strategy that predicts by more than
            its network.
    """
    from clplat.run.export import export as write

    run_dir = Path(run_dir)
    learner = load(run_dir, **objects)
    folder = run_dir / "export" / to if dest is None else Path(dest)
    return write(learner, _config_of(run_dir, "export", objects, data=False), to, folder)


def memorisation(
    run: str | Path | Result, retrained: str | Path | Result | None = None, *,
    benchmark: Literal["tofu", "muse"] = "tofu", path: str | Path | None = None, forget: str | None = None,
    most: int | None = None, batch_size: int = 8, device: str = "cpu",
) -> dict[str, Any]:  # fmt: skip
    """What a run's language model still knows of erased texts, by TOFU's or MUSE's measures; also into its report.

    Written to memorisation.json in the run's folder and, where it has answered a request, shown in erasure.html.

    Args:
        run: result or folder of a run of backbone language_model on texts; of its last checkpoint.
        retrained: of one that never had the erased texts, or was trained anew without them. None: what needs it
            (forget quality, privacy leakage) is None, and `why_null` says why.
        path: of the benchmark's files; None: that of the run's stream tofu, or the benchmark's name, in the data root.
        forget: of tofu, the set that was erased; None: that of the run's stream tofu, or forget10.
        most: questions or texts of each set, the first ones, ≥ 1; None: all.
        batch_size: texts at once, ≥ 1.
        device: where to compute, as torch names it.

    Returns:
        Of both models: `forget_quality` (tofu), `privacy_leakage`; of each: `run`, `retrained`. What was `asked`.

    Raises:
        UserError: not a run of a language model, or one that predicts by more than its network; as `load` does.
        MissingError: a file of the benchmark is not there; says what to put where.
    """
    from clplat.report.erasure import write_erasure
    from clplat.report.evidence import checkpoint_sha256
    from clplat.run import memorisation as measured

    own, theirs = (None if r is None else Path(r.run_dir if isinstance(r, Result) else r) for r in (run, retrained))
    assert own is not None
    configs = [(of, _config_of(of, "memorisation", {}, data=False)) for of in (own, theirs) if of is not None]
    asked = measured.benchmark_of(configs[0][1], benchmark, path, forget, most)
    measured.check(most=most, batch_size=batch_size, device=device)
    made = (lambda of=of, c=c: measured.Reader(load(of), c, device, batch_size) for of, c in configs)
    found = measured.compared(asked, list(made))
    of_run = {"retrained_run": None if theirs is None else str(theirs), "checkpoint_sha256": checkpoint_sha256(own)}
    write_atomic(own / measured.FILE, to_json(found | of_run, indent=1))
    write_erasure(own, configs[0][1].audit.oracle)
    return found | of_run


def _dry_run(config: Config) -> Result:
    import tempfile

    from clplat.run.build import build_stream
    from clplat.run.launch import launch
    from clplat.run.shadows import faults

    if config.audit.shadows and (refused := faults(config, build_stream(config))):  # two steps make no such models
        raise UserError(*refused)
    config = replace(config, audit=replace(config.audit, shadows=0))
    loop = replace(config.loop, max_steps=2, max_env_steps=2, stop_after=1, eval_every=None, checkpoint_every=None)
    config = replace(config, loop=loop, tracking=replace(config.tracking, enabled=False))
    with tempfile.TemporaryDirectory(prefix="clplat-dry-run-") as folder:
        try:
            return launch(config, Path(folder), quiet=True, bare=True)  # no start run is made for two steps
        except Interrupted:
            raise Interrupted("dry run: stopped, nothing left behind") from None
