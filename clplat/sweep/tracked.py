"""A study in MLflow: a run for it, under it one for each trial, and under these those of the seeds."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from clplat.config.settings import Config
from clplat.sweep.plan import Plan
from clplat.sweep.trials import finished, values
from clplat.tracking import nested
from clplat.tracking.client import without_password

_STATUS = {"COMPLETE": "FINISHED", "PRUNED": "KILLED", "FAIL": "FAILED"}
_FILES = ("best.yaml", "front", "sweep.json", "report.md", "study.html")


def begin(folder: Path, run_dir: Path, config: Config) -> None:
    """Have a run nested under its trial, and that under its study.

    Args:
        folder: of the study.
        run_dir: in a folder `trial-...` in it.
        config: of the run.
    """
    parts = run_dir.relative_to(folder).parts
    depth = next(i for i, part in enumerate(parts, 1) if part.startswith("trial-"))
    tags = {"strategy": config.strategy.name, "stream": config.stream.name}
    nested.begin(folder, config.tracking, config.output, "study", folder.name, tags)
    trial = Path(*parts[:depth])
    nested.begin(folder / trial, config.tracking, config.output, "trial", f"{folder.name}/{trial}", tags)


def end(study: Any, plan: Plan, best: Mapping[str, float] | None) -> str | None:
    """Write down how study and trials ended and send what is held back; one line if the store is away.

    Args:
        best: metrics of the best trial; None where there is none.
    """
    trials = [t for t in study.get_trials(deepcopy=False) if finished(t) and "folder" in t.user_attrs]
    for trial in trials:
        if "same_as" in trial.user_attrs:  # its folder is another's
            continue
        ended = trial.datetime_complete.timestamp() if trial.datetime_complete else None
        metrics = _of_validation(dict(zip(plan.metrics, trial.values or (), strict=False)))
        why = trial.user_attrs.get("reason") or trial.user_attrs.get("stopped") or ""
        tags = {"trial": str(trial.number), **({"why": why} if why else {})}
        nested.end(plan.folder / trial.user_attrs["folder"], _STATUS[trial.state.name], params=values(trial),
                   metrics=metrics, tags=tags, ended=ended)  # fmt: skip
        nested.end(plan.folder / "held-out" / trial.user_attrs["folder"], "FINISHED", params=values(trial),
                   metrics={}, tags={**tags, "held_out": str(plan.held_out)})  # fmt: skip
    params = {"metrics": plan.metrics, "directions": plan.directions, "trials": plan.trials, "sampler": plan.sampler,
              "pruner": plan.pruner, "seeds": plan.seeds, "protocol": str(plan.protocol), "choose": plan.choose,
              "storage": without_password(plan.storage)}  # fmt: skip
    params |= {f"space.{key}": str(span) for key, span in plan.space.items()}
    note = plan.folder / "report.md"
    tags = {"mlflow.note.content": note.read_text(encoding="utf-8")} if note.is_file() else {}
    nested.end(plan.folder, "FAILED" if best is None else "FINISHED", params=params, tags=tags,
               metrics=_of_validation(best or {}),
               artifacts=[plan.folder / name for name in _FILES if (plan.folder / name).exists()])  # fmt: skip
    return nested.send(plan.folder)


def _of_validation(means: Mapping[str, float]) -> dict[str, float]:
    """Under names of their own: no chart of runs shall draw them with those of learners."""
    return {f"valid/{metric}": value for metric, value in means.items()}
