"""The conformance suite: what every strategy and every stream must do, ours and third parties'.

    from clplat.testing import run_checks
    results = run_checks("path/to/file.py:Class")
    results = run_checks("digits", group="streams", keys=["--stream.experiences", "2"])

Runs in this process on one core of the CPU, on tiny streams of the kinds that the strategy declares, and writes no
file; `processes` and `fewer_processes` start two more processes, which write to a temporary folder. A strategy with
options `memory` or `replay_batch` is checked with small ones. A stream is checked as it is, with the options it is
given. May import what a run is made of, and `run`.
"""

from __future__ import annotations

import difflib
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from clplat.components.state import rng_state, set_rng_state
from clplat.errors import UserError
from clplat.testing import checks_of_actions as actions
from clplat.testing import checks_of_runs as runs
from clplat.testing import checks_of_settings as settings
from clplat.testing import checks_of_state as states
from clplat.testing import checks_of_streams as streams
from clplat.testing.checks_of_processes import fewer_processes, processes
from clplat.testing.checks_of_streams import StreamSubject
from clplat.testing.result import CheckFailed, CheckResult, NotApplicable
from clplat.testing.subject import Subject

__all__ = ["CHECKS", "STREAM_CHECKS", "CheckResult", "check", "judge", "run_checks"]

Group = str  # strategies or streams
CHECKS: dict[str, Callable[[Subject], None]] = {
    f.__name__: f
    for f in (
        runs.hooks,
        runs.arguments,
        states.state,
        states.growth,
        states.resume,
        runs.frozen_parameters,
        runs.frozen_backbone,
        runs.mechanism,
        runs.erasure,
        runs.task_free,
        runs.test_data,
        runs.unlabelled,
        actions.acting,
        states.memory,
        runs.seed,
        runs.leaks,
        settings.mixed,
        settings.accumulation,
        processes,
        fewer_processes,
    )
}


STREAM_CHECKS: dict[str, Callable[[StreamSubject], None]] = {
    f.__name__: f
    for f in (
        streams.options,
        streams.names,
        streams.shapes,
        streams.classes,
        streams.held_out,
        streams.seed,
        streams.order,
        streams.prepare,
    )
}


def run_checks(
    name_or_path: str, checks: Sequence[str] | None = None, *, group: Group = "strategies", keys: Sequence[str] = ()
) -> list[CheckResult]:
    """Results of the checks on one strategy or stream, in the order of `CHECKS` or `STREAM_CHECKS`.

    Args:
        name_or_path: a registered name, or `path/to/file.py:Class`.
        checks: which of them; None takes all. All but `processes` and `fewer_processes` take a few seconds together.
        group: what it is the name of.
        keys: of a configuration, as on the command line, with which a stream is built.

    Raises:
        UserError: unknown name, check or key, or what it needs is not installed.
        MissingError: the data of a stream are not there.
    """
    return list(_results(name_or_path, checks, group, keys))


def check(name_or_path: str, group: Group = "strategies", keys: Sequence[str] = ()) -> int:
    """Run all checks and print a line for each; returns the exit code, 1 if one failed. Raises as `run_checks`."""
    results, known = [], _known(group)
    for result in _results(name_or_path, None, group, keys):
        results.append(result)
        guards = (known[result.name].__doc__ or "").splitlines()[0]
        print(f"{result.status:<14}  {result.name:<17}  {result.message or guards}", flush=True)
    failed = [r.name for r in results if r.status == "failed"]
    passed, other = (sum(r.status == s for r in results) for s in ("passed", "not applicable"))
    apart = f", {other} {'does' if other == 1 else 'do'} not apply" if other else ""
    tail = f", {len(failed)} failed: {', '.join(failed)}" if failed else ""
    print(f"{name_or_path}: {passed} passed{apart}{tail}")
    return 1 if failed else 0


def judge(subject: Any, name: str, function: Callable[[Any], None] | None = None) -> CheckResult:
    """One check of one strategy, or by `function`; whatever it raises is its result."""
    with _undisturbed():
        try:
            (function or CHECKS[name])(subject)
        except NotApplicable as reason:
            return CheckResult(name, "not applicable", str(reason))
        except CheckFailed as error:
            return CheckResult(name, "failed", str(error))
        except Exception as error:  # noqa: BLE001 - the code under test may raise anything
            place = traceback.extract_tb(error.__traceback__)[-1]
            text = f"raised {type(error).__name__}: {error} ({place.filename}:{place.lineno})"
            return CheckResult(name, "failed", " ".join(text.split()))
    return CheckResult(name, "passed")


def _known(group: Group) -> Mapping[str, Callable[[Any], None]]:
    return CHECKS if group == "strategies" else STREAM_CHECKS


def _results(
    name_or_path: str, checks: Sequence[str] | None, group: Group, keys: Sequence[str]
) -> Iterator[CheckResult]:
    known = _known(group)
    for name in checks or ():
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1) or list(known)
            raise UserError(f"checks: unknown check '{name}' (valid: {', '.join(near)})")
    wanted = [name for name in known if checks is None or name in checks]
    if group == "streams":
        stream = StreamSubject(name_or_path, keys)
        with _undisturbed():
            _ = stream.stream  # one that can't be built at all is the user's mistake, not a failed check
        yield from (judge(stream, name, known[name]) for name in wanted)
        return
    subject = Subject(name_or_path)
    with _undisturbed():
        sound = judge(subject, "hooks").status == "passed"
        if sound:
            _ = subject.backbone  # as above
    for name in wanted:
        if sound or name == "hooks":
            yield judge(subject, name)
        else:
            yield CheckResult(name, "not applicable", "its hooks must be right first")


@contextmanager
def _undisturbed() -> Iterator[None]:
    """On one thread and without warnings; random states are afterwards as they were."""
    threads, random = torch.get_num_threads(), rng_state()
    torch.set_num_threads(1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.set_num_threads(threads)
        set_rng_state(random)
