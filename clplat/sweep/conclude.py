"""The end of a study: the best configuration or the front of them, what tuning gained, and files that say so."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from clplat.config.settings import TUNED
from clplat.errors import UserError
from clplat.files import to_json, write_atomic
from clplat.sweep import held_out
from clplat.sweep.early import Run
from clplat.sweep.objectives import choose, front
from clplat.sweep.plan import Plan, nested
from clplat.sweep.progress import outcome, scores, shown
from clplat.sweep.trials import finished, values


@dataclass(frozen=True, repr=False)
class SweepResult:
    """What a search found.

    Args:
        best_value: of the (first) metric on validation data, averaged over the seeds.
        best_params: configuration key → value.
        best_config: best.yaml, a configuration to run.
        trials: all of them, as in sweep.json.
        folder: of the study: best.yaml, sweep.json, report.md and a folder for each trial.
        front: of two metrics, the trials that no other is better than in both: number, values, params, config.
    """

    best_value: float
    best_params: dict[str, Any]
    best_config: Path
    trials: list[dict[str, Any]]
    folder: Path
    front: list[dict[str, Any]] = field(default_factory=list)

    def frame(self) -> Any:
        """A pandas DataFrame of a row for each trial: what became of it, its value and what it was run with."""
        import pandas

        facts = ("number", "state", "value", "seconds", "folder")
        return pandas.DataFrame([{**{k: t[k] for k in facts}, **t["params"]} for t in self.trials])

    def __repr__(self) -> str:
        best = f"best {self.best_value:.4g} with {shown(self.best_params)}"
        return f"SweepResult({best}; of {len(self.trials)} trials; run it: {self.best_config})"

    def _repr_html_(self) -> str:
        """Its line, and the trials."""
        return f"<p>{escape(repr(self))}</p>{self.frame().to_html(index=False, na_rep='')}"


def conclude(study: Any, plan: Plan, quiet: bool, run: Run) -> SweepResult:
    """Write best.yaml, for two metrics a file for each point of the front, sweep.json and report.md."""
    known = study.get_trials(deepcopy=False)
    rows = [_row(t, plan) for t in known if "given_back" not in t.user_attrs]
    complete = [t for t in known if t.state.name == "COMPLETE"]
    if not complete:
        reasons = dict.fromkeys(t["reason"] for t in rows if t["reason"])
        raise UserError(f"sweep: none of {len(rows)} trials succeeded: {'; '.join(reasons) or 'their workers died'}")
    best_ones = [complete[i] for i in front([t.values for t in complete], plan.directions)]
    best = best_ones[choose([t.values for t in best_ones], plan.metrics, plan.directions, plan.choose)]
    gain, effort = _gain(complete, best, plan), _effort(known)
    default = next((t.number for t in complete if t.user_attrs.get("default")), None)
    compared = [t for t in complete if t.number == default] + [t for t in best_ones if t.number != default]
    measured = held_out.measure(compared, plan, run, quiet)
    for old in (plan.folder / "front").glob("trial-*.yaml"):  # of a study that had fewer trials then
        old.unlink()
    points = [_point(t, plan, effort) for t in best_ones] if len(plan.metrics) > 1 else []
    path = _write_config(plan, best, plan.folder / "best.yaml", f"Best of {len(complete)} trials", [effort, gain])
    facts = {"study": plan.study, "metric": plan.metrics[0], "direction": plan.directions[0],
             "metrics": plan.metrics, "directions": plan.directions, "evaluated_on": "valid", "seeds": plan.seeds,
             "best": {"number": best.number, "value": best.values[0], "values": best.values, "params": values(best)},
             "front": points, "gain": gain, "protocol": str(plan.protocol), "effort": effort,
             "held_out": held_out.facts(default, measured, plan), "trials": rows}  # fmt: skip
    write_atomic(plan.folder / "sweep.json", to_json(facts, indent=1))
    lines = [*_lines(complete, best, best_ones, plan), gain, *held_out.lines(default, measured, plan),
             f"protocol: {plan.protocol}", f"spent: {effort}"]  # fmt: skip
    write_atomic(plan.folder / "report.md", _report(lines, rows, plan))
    if not quiet:
        print("\n".join(lines))
        print(f"run it: clplat run {path}", flush=True)
    return SweepResult(best.values[0], values(best), path, rows, plan.folder, points)


def _lines(complete: Sequence[Any], best: Any, best_ones: Sequence[Any], plan: Plan) -> list[str]:
    """What a study found, a fact a line."""
    found = [f"best of {len(complete)}: trial {best.number}, {scores(best.values, plan)}  {shown(values(best))}"]
    if len(plan.metrics) > 1:
        found[0] = f"{found[0]}  ({plan.choose} of {len(best_ones)} on the front)"
        found += [f"front: trial {t.number}, {scores(t.values, plan)}  {shown(values(t))}" for t in best_ones]
    return found


def _gain(complete: Sequence[Any], best: Any, plan: Plan) -> str:
    """What tuning gained over the default, on validation data."""
    default = next((t for t in complete if t.user_attrs.get("default")), None)
    if default is None:
        return "default: no figure (it failed, or a searched key has no default), so what tuning gained is not known"
    rows = zip(plan.metrics, default.values, best.values, strict=True)
    changes = ", ".join(f"{m} {before:.4f} → {after:.4f} ({after - before:+.4f})" for m, before, after in rows)
    return f"default → best, on validation data: {changes}"


def _point(trial: Any, plan: Plan, effort: str) -> dict[str, Any]:
    path = plan.folder / "front" / f"trial-{trial.number:04d}.yaml"
    path.parent.mkdir(exist_ok=True)
    _write_config(plan, trial, path, f"Trial {trial.number}, on the front", [effort])
    return {"number": trial.number, "values": trial.values, "params": values(trial), "config": str(path)}


def _effort(known: Sequence[Any]) -> str:
    """What tuning took, in all trials, also those that failed."""
    counted = [t for t in known if finished(t)]
    total = {k: sum(t.user_attrs.get("spent", {}).get(k, 0) for t in counted) for k in ("runs", "seconds", "flops")}
    flops = f", {total['flops']:.3g} FLOPs" if total["flops"] else ""
    return f"{len(counted)} trials, {total['runs']} runs, {total['seconds']:.0f} s in training and evaluation{flops}"


def _write_config(plan: Plan, trial: Any, path: Path, what: str, notes: Sequence[str]) -> Path:
    """A configuration to run, which says where its values are from, and has each run of it say so; `notes` begin with
    what tuning took. One for several streams has a run for each."""
    import yaml

    tuned = f"study {plan.study}: {plan.protocol}; {notes[0]}"
    chosen = nested(plan.base, {**values(trial), f"tracking.tags.{TUNED}": tuned})
    if plan.protocol.streams and not plan.protocol.transfers:
        chosen.pop("stream", None)
        streams = zip(plan.protocol.labels(), plan.protocol.streams, strict=True)
        chosen["runs"] = {label: {"stream": stream} for label, stream in streams}
    lines = [f"{what} of study {plan.study}: {scores(trial.values, plan)} on validation data.", f"{plan.protocol}."]
    head = "".join(f"# {line[0].upper()}{line[1:]}\n" for line in [*lines, *notes])
    write_atomic(path, head + yaml.safe_dump(copy.deepcopy(chosen), sort_keys=False, allow_unicode=True))
    return path


def _report(lines: Sequence[str], rows: Sequence[Mapping[str, Any]], plan: Plan) -> str:
    """report.md: the findings, and a table of all trials."""
    head = "".join(f"- {line}\n" for line in lines)
    keys = list(plan.space)
    table = [["trial", "ended", *keys], ["---"] * (len(keys) + 2)]
    table += [[str(r["number"]), r["outcome"], *(str(r["params"].get(k, "")) for k in keys)] for r in rows]
    body = "".join("| " + " | ".join(c.replace("|", "\\|") for c in row) + " |\n" for row in table)
    return f"# Study {plan.study}\n\n{head}\n{body}"


def _row(trial: Any, plan: Plan) -> dict[str, Any]:
    folder, ended = trial.user_attrs.get("folder"), trial.state.is_finished()
    found = trial.values if trial.state.name == "COMPLETE" else None
    return {
        "number": trial.number,
        "state": trial.state.name.lower(),
        "value": found[0] if found else None,
        "values": found,
        "params": values(trial),
        "seconds": trial.duration.total_seconds() if trial.duration else None,
        "folder": str(plan.folder / folder) if folder else None,
        "default": bool(trial.user_attrs.get("default")),
        "repeat_of": trial.user_attrs.get("repeat_of"),
        "reason": trial.user_attrs.get("reason"),
        "outcome": outcome(trial, plan) if ended else "not ended",
    }
